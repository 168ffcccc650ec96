"""The built-in planet: a procedural world with its own tiles and photos, for demo, tests and accuracy.

It is not Earth. Everything is a function of the seed, so it needs no files and no network, and the place of
every photo is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import TileError
from geoengine.engine.sources import WORLD_BOUNDS, TileBatch, fingerprint
from geoengine.engine.sources.planet.maps import render_cells
from geoengine.engine.sources.planet.photos import render_photo
from geoengine.engine.sources.planet.world import World
from geoengine.engine.tiles import Tile, as_xy, xy_at

MAX_ZOOM = 18
TILE_SIZE = 112  # pixels; the planet's encoders see tiles at exactly this size
_CHUNK = 32
_DRAWING = 1  # to be raised when tiles come out different
_FINE_ZOOM = 24  # where coordinates are looked up for land and sea

UInt8Array = npt.NDArray[np.uint8]


@lru_cache(maxsize=1)
def default_world() -> World:
    """Return the planet that the package's encoders were trained on."""
    return World()


def tile(z: int, x: int, y: int, *, size: int = 256) -> UInt8Array:
    """Draw the map tile (z, x, y), XYZ addressing, zooms 0 to 18, as RGB uint8[size, size, 3].

    Raises TileError for a tile that does not exist.
    """
    address = Tile(z, x, y)
    [picture] = _draw(default_world(), z, np.array([[address.x, address.y]]), size)
    return np.asarray(picture)


def photo(lat: float, lng: float, seed: int, *, height: int = 480) -> UInt8Array:
    """Take a photo at a place in degrees, as RGB uint8[height, height * 4 / 3, 3].

    `seed` chooses what differs between two photos of one place: light, weather, positions, what is missing.
    """
    x, y = xy_at(lng, lat, 16)[0].tolist()
    return render_photo(default_world(), x, y, seed, height)[0]


def is_land(lng: npt.ArrayLike, lat: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Tell for points in degrees, float[n] each, whether they are on land; bool[n]."""
    fine = (xy_at(lng, lat, _FINE_ZOOM) + 0.5) / (1 << _FINE_ZOOM)
    return default_world().is_land(fine[:, 0], fine[:, 1])


class PlanetSource:
    """The planet as a tile source: every tile of zooms 0 to 18 exists."""

    name = "planet"
    world = "planet"
    attribution = ""
    tile_size = TILE_SIZE
    min_zoom = 0
    max_zoom = MAX_ZOOM
    storable = True
    bounds = WORLD_BOUNDS

    @property
    def identity(self) -> str:
        """A hash of the seed and the version of the drawing, not of pixels, which CPUs round differently."""
        return fingerprint("planet", str(default_world().seed), str(TILE_SIZE), str(_DRAWING))

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles `xy`, int64[n, 2], of zoom z in order, in chunks of at most 32."""
        xy = as_xy(z, xy)
        if z > MAX_ZOOM and len(xy):
            raise TileError(f"the planet has zooms 0 to {MAX_ZOOM}; got {z}")
        for start in range(0, len(xy), _CHUNK):
            part = xy[start : start + _CHUNK]
            pixels = _draw(default_world(), z, part, TILE_SIZE)
            yield TileBatch(np.arange(start, start + len(part), dtype=np.int64), pixels)

    def close(self) -> None:
        """Do nothing: the planet holds no files."""


def _draw(world: World, z: int, xy: npt.NDArray[np.int64], size: int) -> UInt8Array:
    """Draw tiles of any zoom 0 to 18 from cells of the nearest even level; [n, size, size, 3]."""
    if z > MAX_ZOOM:
        raise TileError(f"the planet has zooms 0 to {MAX_ZOOM}; got {z}")
    level = min(max(z - z % 2, 2), 16)
    if level == z:
        return render_cells(world, level, xy, size)
    if level > z:
        return np.stack([_draw_overview(world, level, level - z, row, size) for row in xy])
    return np.stack([_draw_detail(world, level, z - level, row, size) for row in xy])


def _draw_detail(world: World, level: int, deeper: int, xy: npt.NDArray[np.int64], size: int) -> UInt8Array:
    """Cut a tile out of the cell of `level` that it lies in, drawn 2^deeper times as large."""
    cell = render_cells(world, level, xy[None] >> deeper, size << deeper)[0]
    left, top = ((xy & ((1 << deeper) - 1)) * size).tolist()
    return np.ascontiguousarray(cell[top : top + size, left : left + size])


def _draw_overview(world: World, level: int, higher: int, xy: npt.NDArray[np.int64], size: int) -> UInt8Array:
    """Put a tile together from its 2^higher x 2^higher cells of `level`."""
    count = 1 << higher
    side = -(-size // count)
    inner = np.stack(np.meshgrid(range(count), range(count), indexing="xy"), axis=-1).reshape(-1, 2)
    cells = render_cells(world, level, xy[None] * count + inner, side)
    whole = (
        cells.reshape(count, count, side, side, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(count * side, count * side, 3)
    )
    return np.asarray(cv2.resize(whole, (size, size), interpolation=cv2.INTER_AREA), dtype=np.uint8)
