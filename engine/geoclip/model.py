"""`GeoClip`: photos in, places out, without a map tile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import Backend, open_backend
from geoengine.engine.bundle import GEOCLIP, EngineBundle
from geoengine.engine.errors import BundleError
from geoengine.engine.geoclip.evidence import GeoClipEvidence, TileCentres
from geoengine.engine.geoclip.gallery import Gallery
from geoengine.engine.geoclip.locations import LocationEncoder
from geoengine.engine.manifest import PHOTO
from geoengine.engine.photos import Photo
from geoengine.engine.preprocess import to_square
from geoengine.engine.regions import Region
from geoengine.engine.tiles import great_circle_km_array

_PHOTO_CHUNK = 64


@dataclass(frozen=True, slots=True, eq=False)
class TwoSquares(Photo):
    """A photo as the map search sees it, and `other`, uint8[S, S, 3], as GeoCLIP does."""

    other: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Matches:
    """The gallery's best points for one photo, best first.

    `points` is float64[t, 2], longitude and latitude in degrees; `scores` are cosines, `shares` a softmax
    over all points that were compared, with GeoCLIP's logit scale. A point has the shares of those that were
    left out because they are near it. All of them, the nearest to the first one
    first, are in `distances_km` from it, float64[n], and `within`, the sum of shares up to each, float64[n].
    """

    points: NDArray[np.float64]
    scores: NDArray[np.float32]
    shares: NDArray[np.float64]
    distances_km: NDArray[np.float64]
    within: NDArray[np.float64]

    def radius_km(self, share: float) -> float:
        """Return the great-circle distance from the first point within which a share of the softmax lies.

        It is at least the distance to the next point: what lies between, the gallery does not tell apart. It
        is not calibrated.
        """
        # The sum of shares that make up the share exactly may come out an ulp short.
        reached = int(np.searchsorted(self.within, share - 1e-12))
        return float(self.distances_km[min(max(reached, 1), len(self.distances_km) - 1)])


class GeoClip:
    """Compares photos with GeoCLIP's gallery, exactly: every point, at every call.

    `backend` runs the photo encoder of `bundle`, GeoCLIP's own. `cache` is a folder for the embeddings of
    tile centres that `evidence` computes.
    """

    def __init__(
        self,
        bundle: EngineBundle,
        backend: Backend,
        *,
        threads: int | None = None,
        cache: Path | None = None,
    ) -> None:
        if bundle.manifest.geoclip is None:
            raise BundleError(no_geoclip(bundle))
        self.bundle, self.backend = bundle, backend
        self.logit_scale = bundle.manifest.geoclip.logit_scale
        self.gallery = Gallery.open(bundle)
        self.locations = LocationEncoder.open(bundle, threads=threads)
        self._centres = TileCentres(bundle, self.locations, cache)

    @classmethod
    def open(
        cls,
        bundle: EngineBundle,
        *,
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
        cache: Path | None = None,
    ) -> GeoClip:
        """Open the GeoCLIP of a bundle; the arguments are those of `open_backend`, and `cache` as above.

        Raises BundleError, with the command that mends it, when the bundle has none or a damaged one.
        """
        own = bundle.geoclip()
        if own is None or own.world != bundle.world:
            raise BundleError(no_geoclip(bundle))
        with ExitStack() as undo:
            opened = open_backend(own, backend=backend, precision=precision, threads=threads)
            undo.callback(opened.close)
            made = cls(own, opened, threads=threads, cache=cache)
            undo.pop_all()
        return made

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()

    def embed(self, photos: Sequence[Photo]) -> NDArray[np.float32]:
        """Return the photos' unit embeddings, float32[n, d]."""
        embeddings = np.empty((len(photos), self.bundle.embed_dim), dtype=np.float32)
        for start in range(0, len(photos), _PHOTO_CHUNK):
            chunk = photos[start : start + _PHOTO_CHUNK]
            squares = np.stack([self.square(photo) for photo in chunk])
            embeddings[start : start + len(chunk)] = self.backend.encode(PHOTO, squares)
        return embeddings

    def square(self, photo: Photo) -> NDArray[np.uint8]:
        """Return a photo as the encoder sees it, uint8[S, S, 3]."""
        pixels = photo.other if isinstance(photo, TwoSquares) else photo.pixels
        return to_square(pixels, self.bundle.image_size, self.bundle.manifest.resize_mode)

    def best(
        self,
        embeddings: NDArray[np.float32],
        top: int,
        *,
        within: Region | None = None,
        apart_km: float = 0.0,
    ) -> list[Matches]:
        """Return at most `top` points of the gallery for each photo embedding, float32[p, d].

        With `within`, only points there are compared. With `apart_km`, a point nearer than that to a better
        one is left out. Raises RegionError when there are none.
        """
        rows = self.gallery.within(within)
        points = self.gallery.points if rows is None else self.gallery.points[rows]
        found = []
        for query in embeddings:
            scores, shares = (v[0] for v in self.gallery.shares(query[None], self.logit_scale, rows))
            found.append(_matches(points, scores, shares, top, apart_km))
        return found

    def evidence(self, embeddings: NDArray[np.float32]) -> GeoClipEvidence:
        """Return what GeoCLIP says of map tiles for photo embeddings, float32[p, d]."""
        return GeoClipEvidence(self.gallery, self._centres, self.logit_scale, embeddings)


def _matches(
    points: NDArray[np.float64],
    scores: NDArray[np.float32],
    shares: NDArray[np.float64],
    top: int,
    apart_km: float,
) -> Matches:
    order = np.argsort(-scores, kind="stable")
    distances = _distances_km(points, order[0])
    nearest_first = np.argsort(distances, kind="stable")
    best, masses = order[:top], shares[order[:top]]
    if apart_km > 0:
        best, masses = _apart(points, shares, order, top, apart_km)
    return Matches(
        points=points[best],
        scores=scores[best],
        shares=masses,
        distances_km=distances[nearest_first],
        within=np.cumsum(shares[nearest_first]),
    )


def _apart(
    points: NDArray[np.float64],
    shares: NDArray[np.float64],
    order: NDArray[np.intp],
    top: int,
    apart_km: float,
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the best rows that lie apart, and the shares of the points around each, float64[t]."""
    best: list[np.intp] = []
    masses: list[float] = []
    while len(order) and len(best) < top:
        distances = _distances_km(points[order], 0)
        near = distances < apart_km
        best.append(order[0])
        masses.append(float(shares[order[near]].sum()))
        order = order[~near]
    return np.array(best), np.array(masses)


def _distances_km(points: NDArray[np.float64], row: int | np.intp) -> NDArray[np.float64]:
    """Return the great-circle distances of all points from one of them."""
    lng, lat = points[row]
    return great_circle_km_array(lng, lat, points[:, 0], points[:, 1])


def no_geoclip(bundle: EngineBundle) -> str:
    """Return the sentence that says how a bundle gets GeoCLIP, or that it cannot."""
    if bundle.world != "earth":
        return f"GeoCLIP knows Earth, and engine bundle {bundle.path} another world: search with method tiles"
    return (
        f"engine bundle {bundle.path} has no GeoCLIP: "
        f"`geoengine build-engines --geoclip --out {bundle.path}` adds it"
    )


def no_map_encoders(bundle: EngineBundle) -> str:
    """Return the sentence that says what can be done with a bundle of GeoCLIP alone."""
    out = bundle.path.parent if bundle.path.name == GEOCLIP else bundle.path
    return (
        f"engine bundle {bundle.path} has GeoCLIP and no map encoders: locate with --method geoclip, or "
        f"add some with `geoengine build-engines --out {out}`"
    )
