"""The built-in planet as something to train on: photos of known places, drawn as they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from geoengine.engine.preprocess import to_square
from geoengine.engine.sources.planet import default_world
from geoengine.engine.tiles import centers
from geoengine.training import planet_data
from geoengine.training.errors import TrainingError
from geoengine.training.photos import Geometry, Int64Array, Photos, UInt8Array

_TRAINING = 0x7472_6169  # begins the seeds of training; those of evaluation and calibration are below 2^31
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class PlanetPhotos:
    """Photos of level-16 cells `xy`, int64[m, 2]; photo i is drawn with `seeds[i]`."""

    xy: Int64Array
    seeds: Int64Array
    geometry: Geometry
    identity: str

    @property
    def keys(self) -> np.ndarray:
        """The photos' numbers."""
        return np.arange(len(self.xy), dtype=np.uint64)

    @property
    def lng(self) -> np.ndarray:
        """Longitudes of the cells' centres in degrees."""
        return np.asarray(centers(16, self.xy)[:, 0])

    @property
    def lat(self) -> np.ndarray:
        """Latitudes of the cells' centres in degrees."""
        return np.asarray(centers(16, self.xy)[:, 1])

    def called(self, row: int) -> str:
        """Return the photo's number."""
        return f"planet photo {row + 1}"

    def read(self, rows: Int64Array) -> Iterator[tuple[Int64Array, UInt8Array]]:
        """Yield (positions, pixels) of the rows, in order."""
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            pixels = planet_data.render_photos(self.xy[part], self.seeds[part], 1).pixels
            if pixels.shape[1] != self.geometry.size:
                pixels = np.stack([to_square(picture, self.geometry.size) for picture in pixels])
            yield start + np.arange(len(part)), pixels


class Planet:
    """Photos of the planet: half of the training places far apart, half in clusters; validation far apart.

    The same `seed` and `places` give the same photos. They share no random numbers with what `geoengine
    evaluate` and `geoengine calibrate` draw, whatever the seeds.
    """

    name = "planet"
    world = "planet"

    def __init__(self, geometry: Geometry, *, places: int, validation: int, seed: int = 1) -> None:
        if places < 32 or validation < 1:
            raise TrainingError(
                f"the planet needs at least 32 places and 1 of validation, got {places} and {validation}"
            )
        self._geometry, self._places, self._validation, self._seed = geometry, places, validation, seed

    def split(self, name: str) -> Photos:
        """Return a split, "train" or "valid"."""
        rng = np.random.default_rng([_TRAINING, self._seed, int(name == "train")])
        if name == "train":
            apart = planet_data.land_places(rng, self._places // 2)
            xy = np.concatenate([apart, planet_data.clustered_places(rng, self._places - len(apart))])
        else:
            xy = planet_data.land_places(rng, self._validation)
        identity = f"planet-{default_world().seed}-{name}-{self._seed}-{len(xy)}-{self._geometry.size}"
        return PlanetPhotos(xy, rng.integers(2**31, size=len(xy)), self._geometry, identity)
