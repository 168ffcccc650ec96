"""The pictures from which int8 takes its ranges: the user's own, or such as the package can draw.

Nothing but their ranges of activations is learned from them, so what they show matters less than that they
are of many kinds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.errors import ExportError
from geoengine.engine.photos import expand_photo_paths, read_photo
from geoengine.engine.preprocess import to_square
from geoengine.engine.sources import planet
from geoengine.engine.tiles import LEVELS
from geoengine.export.pictures import sample_pictures

FEWEST = 16
"""Pictures that a folder must hold."""

MOST = 128
"""Pictures that are taken from a folder, evenly over the sorted names."""

_TILES_PER_LEVEL, _PHOTOS, _SAMPLES = 8, 32, 32
_SEED = 20  # others than those of `check_pictures`, by which the build is judged


def calibration_pictures(folder: Path | None, side: int) -> NDArray[np.uint8]:
    """Return uint8[n, side, side, 3] from a folder of map tiles and photos, or drawn by the package.

    Either way patterns, shapes and flat colours are among them, for pictures unlike the rest. The same
    arguments give the same pictures. Raises ExportError for a folder with fewer than FEWEST pictures,
    PhotoError for a picture that cannot be read.
    """
    seen = _planet(side) if folder is None else _from_folder(folder, side)
    return np.concatenate([seen, sample_pictures(side, _SAMPLES, seed=_SEED), _flat(side)])


def _from_folder(folder: Path, side: int) -> NDArray[np.uint8]:
    paths = expand_photo_paths([folder])
    if len(paths) < FEWEST:
        raise ExportError(
            f"{folder} holds {len(paths)} pictures, and calibration needs at least {FEWEST}: add map tiles "
            "and photos of the kinds that will be searched"
        )
    chosen = np.linspace(0, len(paths) - 1, min(len(paths), MOST)).round().astype(int)
    return np.stack([to_square(read_photo(paths[index]).pixels, side) for index in chosen])


def _planet(side: int) -> NDArray[np.uint8]:
    """Draw the planet's tiles at every level and photos of it; every fourth picture in negative."""
    rng = np.random.default_rng(_SEED)
    pictures = []
    for zoom in LEVELS:
        for x, y in rng.integers(0, 1 << zoom, (_TILES_PER_LEVEL, 2)).tolist():
            pictures.append(planet.tile(zoom, x, y, size=side))
    for number in range(_PHOTOS):
        lat, lng = rng.uniform(-70, 70), rng.uniform(-180, 180)
        pictures.append(to_square(planet.photo(lat, lng, number, height=side), side))
    pictures[::4] = [255 - picture for picture in pictures[::4]]
    return np.stack(pictures)


def _flat(side: int) -> NDArray[np.uint8]:
    """Return black, white, and the colours at the corners between them."""
    corners = np.stack(np.meshgrid([0, 255], [0, 255], [0, 255]), axis=-1).reshape(-1, 1, 1, 3)
    return np.broadcast_to(corners, (8, side, side, 3)).astype(np.uint8)
