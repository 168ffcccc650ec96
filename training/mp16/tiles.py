"""The map tiles that a data set is trained with: those of all zooms that hold one of its photos."""

from __future__ import annotations

import numpy as np

from geoengine.engine.tiles import LEVEL_STEP, XyArray, descendants_xy, xy_at


def tiles_of(places: list[tuple[float, float]], z: int, *, siblings: bool) -> XyArray:
    """Return the tiles of zoom z that hold a place (longitude, latitude), int64[n, 2], each once.

    With `siblings`, also the 15 others that share their parent two zooms up, which are what the search has to
    tell them from.
    """
    points = np.array(places, np.float64).reshape(-1, 2)
    if not siblings:
        return np.unique(xy_at(points[:, 0], points[:, 1], z), axis=0)
    parents = np.unique(xy_at(points[:, 0], points[:, 1], z - LEVEL_STEP), axis=0)
    return np.unique(descendants_xy(parents, z - LEVEL_STEP, z), axis=0)
