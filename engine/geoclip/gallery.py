"""GeoCLIP's gallery: the points that a photo is compared with, and how its probability lies on the map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BundleError
from geoengine.engine.index.segments import Ids, tile_ids
from geoengine.engine.regions import Region, RegionError
from geoengine.engine.tiles import xy_at
from geoengine.kernels import cosine_topk

ORDER_ZOOM = 24
"""The points are in the order of their tiles of this zoom, some two metres wide, along a Z-curve."""


@dataclass(frozen=True, slots=True, eq=False)
class Gallery:
    """Points float64[n, 2], longitude and latitude in degrees, and unit embeddings float16[n, d].

    `ids` are the points' tiles of ORDER_ZOOM, which rise: the points in any coarser tile lie side by side.
    """

    points: NDArray[np.float64]
    embeddings: NDArray[np.float16]
    ids: Ids

    @classmethod
    def open(cls, bundle: EngineBundle) -> Gallery:
        """Map a bundle's gallery into memory; raises BundleError when it cannot be used."""
        files = bundle.manifest.geoclip
        if files is None:
            raise BundleError(f"engine bundle {bundle.path} has no gallery")
        try:
            points = np.load(bundle.path / files.points, allow_pickle=False)
            embeddings = np.load(bundle.path / files.embeddings, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BundleError(f"engine bundle {bundle.path}: the gallery cannot be read: {error}") from error
        shapes = points.shape, embeddings.shape
        if shapes != ((len(points), 2), (len(points), bundle.embed_dim)) or not len(points):
            raise BundleError(f"engine bundle {bundle.path}: points and embeddings do not fit: {shapes}")
        ids = order_ids(points)
        if embeddings.dtype != np.float16 or (ids[1:] < ids[:-1]).any():
            raise BundleError(f"engine bundle {bundle.path}: the gallery is not in order, or not in float16")
        return cls(points, embeddings, ids)

    def within(self, region: Region | None) -> NDArray[np.int64] | None:
        """Return the rows of the points in a region, None for all; raises RegionError when there are none."""
        if region is None:
            return None
        rows = np.flatnonzero(
            region.intersects(ORDER_ZOOM, xy_at(self.points[:, 0], self.points[:, 1], ORDER_ZOOM))
        )
        if not len(rows):
            raise RegionError(
                f"GeoCLIP has no point within {region.name}: search there with map tiles, or name a "
                "larger region"
            )
        return rows

    def shares(
        self, queries: NDArray[np.float32], logit_scale: float, rows: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return cosines float32[p, n] of unit queries, and their softmax times `logit_scale`, float64[p, n].

        n are the points of `rows`, by default all.
        """
        scores = cosines(self.embeddings, queries, rows)
        logits = logit_scale * scores.astype(np.float64)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return scores, shares / shares.sum(axis=1, keepdims=True)

    def ranges(self, zoom: int, xy: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return where the points in each tile int64[n, 2] of a zoom begin and end."""
        deeper = np.uint64(2 * (ORDER_ZOOM - zoom))
        ids = tile_ids(xy)
        return np.searchsorted(self.ids, ids << deeper), np.searchsorted(
            self.ids, (ids + np.uint64(1)) << deeper
        )


def order_ids(points: NDArray[np.float64]) -> Ids:
    """Return the points' tiles of ORDER_ZOOM as numbers along a Z-curve."""
    return tile_ids(xy_at(points[:, 0], points[:, 1], ORDER_ZOOM))


def cosines(
    embeddings: NDArray[np.float16], queries: NDArray[np.float32], rows: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Return all cosines, float32[p, n], in the order of the rows; none depends on others in the call."""
    scores, order = cosine_topk(
        embeddings, queries, max(1, len(embeddings if rows is None else rows)), rows=rows
    )
    unsorted = np.empty_like(scores)
    np.put_along_axis(unsorted, order, scores, axis=1)
    return unsorted
