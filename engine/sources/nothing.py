"""No tiles at all: for what needs none, such as GeoCLIP by itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import WORLD_BOUNDS, TileBatch

NO_TILES = (
    "no tile source given: name a URL template with {z}, {x} and {y}, an .mbtiles or .pmtiles file, or a "
    "folder"
)


class NoTiles:
    """Stands in for a tile source of a world where none was named; reading it raises SourceError."""

    name, attribution, identity, storable = "", "", "", False
    tile_size, min_zoom, max_zoom, bounds = 256, 0, 30, WORLD_BOUNDS

    def __init__(self, world: str) -> None:
        self.world = world

    def read(self, z: int, xy: NDArray[np.int64]) -> Iterator[TileBatch]:
        """Raise SourceError, which says how to name tiles."""
        raise SourceError(NO_TILES)

    def close(self) -> None:
        """Do nothing: nothing is open."""
