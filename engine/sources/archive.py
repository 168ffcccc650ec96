"""What the sources share that are one file, with tiles and their description in it."""

import html
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from geoengine.engine.cores import available_cores
from geoengine.engine.errors import SourceError
from geoengine.engine.sources import WORLD_BOUNDS, TileBatch
from geoengine.engine.sources.decode import decode_tile
from geoengine.engine.sources.streaming import Encoded, Job, stream
from geoengine.engine.tiles import LngLatBbox, as_xy

TRIED = 8
"""Tiles looked at to find the side of an archive's tiles."""


class ArchiveSource(ABC):
    """A tile source that looks tiles up in one file, where a look-up takes microseconds."""

    world = "earth"
    storable = True
    tile_size: int
    min_zoom: int
    max_zoom: int
    identity: str
    bounds: LngLatBbox

    @abstractmethod
    def tile_data(self, z: int, x: int, y: int) -> object | None:
        """Return what the file stores for a tile, its bytes if it is sound, or None when there is nothing."""

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles of the request that the file has."""
        tiles = as_xy(z, xy).tolist()
        if self.min_zoom <= z <= self.max_zoom:
            yield from stream(
                self._jobs(z, tiles), workers=available_cores(), tile_size=lambda _: self.tile_size
            )

    def _jobs(self, z: int, tiles: list[list[int]]) -> Iterator[tuple[int, Job]]:
        # Looked up here, in the caller's thread, and decoded in the workers.
        for position, (x, y) in enumerate(tiles):
            data = self.tile_data(z, x, y)
            if data is not None:
                yield position, partial(Encoded, data)


def vector_tiles(file: str) -> SourceError:
    """Return the error for an archive of vector tiles."""
    return SourceError(f"{file}: this file holds vector tiles, but pictures are needed")


def side_of(file: str, tiles: Iterable[object]) -> int:
    """Return the side in pixels of the first picture among an archive's first tiles, which are bytes.

    Raises SourceError when there are no tiles or none is a picture.
    """
    pictures = [decode_tile(data) for data in tiles]
    sides = [picture.shape[1] for picture in pictures if picture is not None]
    if not sides:
        what = "no tiles" if not pictures else "tiles that are not PNG, JPEG or WebP pictures"
        raise SourceError(f"{file}: this file holds {what}")
    return int(sides[0])


def bounds_of(values: Sequence[str | float]) -> LngLatBbox:
    """Return the box (west, south, east, north) that an archive states, or the whole map if it is no box."""
    try:
        box = LngLatBbox(*map(float, values))
    except (TypeError, ValueError):
        return WORLD_BOUNDS
    inside = box.west < box.east and box.south < box.north and box.west >= -180 and box.east <= 180
    return box if inside else WORLD_BOUNDS


def plain_text(text: str) -> str:
    """Return a name or attribution, which in archives is often HTML, without its tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split())
