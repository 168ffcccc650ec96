"""How likely photos are to be taken anywhere, before one is looked at: a prior for the path score."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoengine.engine.errors import GeoEngineError
from geoengine.engine.index.segments import Ids, tile_ids
from geoengine.engine.tiles import bounds_array, xy_at

PRIORS = {"population": Path(__file__).parents[1] / "data" / "population.npz"}
"""Priors that the package brings, by name."""

EVERYWHERE = 0.1
"""The part of a prior that is spread evenly over the world: what was never counted is not impossible."""

MOST_ZOOM = 12
SCHEMA = 1

_WORLDS = ("earth", "planet")


class PriorError(GeoEngineError):
    """A prior is not there, cannot be read, or is of another world."""


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """Counts of people or photos by tile of one zoom: `counts` float64[n] of the tiles `ids`, sorted.

    It is `TileEvidence`: a tile has the counts in it, or its part of those of the tile that it lies in, and
    `EVERYWHERE` times its share of the world's area. Below `zoom` it has no more to say.
    """

    name: str
    world: str
    zoom: int
    ids: Ids
    counts: NDArray[np.float64]
    attribution: str = ""
    _sums: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sums = np.concatenate([[0.0], np.cumsum(self.counts / self.counts.sum())])
        object.__setattr__(self, "_sums", sums)

    def weight(self, zoom: int) -> float:
        """Return 1 down to the zoom of the counts, and 0 below."""
        return 1.0 if zoom <= self.zoom else 0.0

    def log_probability(
        self, photos: NDArray[np.int64], zoom: int, xy: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the logarithm of each tile's probability, float32[p, n], the same for all photos."""
        box = np.radians(bounds_array(zoom, xy))
        area = (box[:, 2] - box[:, 0]) * (np.sin(box[:, 3]) - np.sin(box[:, 1])) / (4 * np.pi)
        counted = (1 - EVERYWHERE) * self._counted(zoom, tile_ids(xy))
        values = np.log(counted + EVERYWHERE * area).astype(np.float32)
        return np.broadcast_to(values, (len(photos), len(values)))

    def _counted(self, zoom: int, ids: Ids) -> NDArray[np.float64]:
        """Return the share of all counts that lies in each tile."""
        finer = max(0, 2 * (self.zoom - zoom))
        coarser = max(0, 2 * (zoom - self.zoom))
        first = (ids >> np.uint64(coarser)) << np.uint64(finer)
        start = np.searchsorted(self.ids, first)
        end = np.searchsorted(self.ids, first + np.uint64(1 << finer))
        return (self._sums[end] - self._sums[start]) / 2.0**coarser

    def write(self, path: Path) -> None:
        """Write the density to a file, whole or not at all; raises PriorError when the system refuses."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("xb") as file:
                np.savez_compressed(
                    file,
                    schema=SCHEMA,
                    name=self.name,
                    world=self.world,
                    zoom=self.zoom,
                    steps=np.diff(self.ids, prepend=np.uint64(0)).astype("<u4"),
                    counts=self.counts.astype("<f4"),
                    attribution=self.attribution,
                )
            temporary.replace(path)
        except OSError as error:
            raise PriorError(f"{path}: cannot be written ({error.strerror or error})") from None
        finally:
            temporary.unlink(missing_ok=True)


def open_prior(spec: str, world: str) -> Density:
    """Open a prior for a world: one of `PRIORS` or a file that `geoengine prior` made; raises PriorError."""
    path = PRIORS.get(spec, Path(spec))
    if not path.is_file():
        raise PriorError(
            f"{spec}: there is no such file, and the priors known by name are {', '.join(PRIORS)}; "
            "`geoengine prior` makes one of the places of photos"
        )
    density = _read(path)
    if density.world != world:
        raise PriorError(f"the prior {spec} is of the world {density.world!r}, and this search of {world!r}")
    return density


def counted(places: ArrayLike, counts: NDArray[np.float64], zoom: int) -> tuple[Ids, NDArray[np.float64]]:
    """Return the tiles of a zoom that hold some of the places, sorted, and the sums of the counts in each.

    `places` are (longitude, latitude) in degrees, [n, 2].
    """
    points = np.asarray(places, dtype=np.float64).reshape(-1, 2)
    ids, of = np.unique(tile_ids(xy_at(points[:, 0], points[:, 1], zoom)), return_inverse=True)
    return ids, np.bincount(of, counts, len(ids)).astype(np.float64)


def _read(path: Path) -> Density:
    try:
        with np.load(path, allow_pickle=False) as data:
            if int(data["schema"]) != SCHEMA:
                raise ValueError(f"this version reads schema {SCHEMA}, got {int(data['schema'])}")
            density = Density(
                name=str(data["name"]),
                world=str(data["world"]),
                zoom=int(data["zoom"]),
                ids=np.cumsum(data["steps"], dtype=np.uint64),
                counts=data["counts"].astype(np.float64),
                attribution=str(data["attribution"]),
            )
        _check(density)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise PriorError(f"{path}: this is no prior that can be used: {error}") from None
    return density


def _check(density: Density) -> None:
    ids, counts = density.ids, density.counts
    if density.world not in _WORLDS or not 0 <= density.zoom <= MOST_ZOOM:
        raise ValueError(f"it is of world {density.world!r:.40} and zoom {density.zoom}")
    if not len(ids) or ids.shape != counts.shape or (ids[1:] <= ids[:-1]).any():
        raise ValueError("its tiles are not in order, or their counts are missing")
    if int(ids[-1]) >> (2 * density.zoom) or not np.isfinite(counts).all() or (counts <= 0).any():
        raise ValueError("it has tiles outside the world, or counts that are not above 0")
