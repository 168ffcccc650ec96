"""Tile maths: the Web-Mercator pyramid, for one tile and for arrays of tiles.

A tile is (z, x, y) in XYZ addressing: at zoom z the map is cut into 2^z columns x, counted eastwards from
longitude -180, and 2^z rows y, counted southwards from latitude 85.05. "eq." numbers are those of the paper.

Arrays of tiles are int64[n, 2] with columns (x, y), all of one zoom; they are called `xy`. The scalar
functions are the array functions applied to one row, so the two forms cannot disagree.
"""

import math
import operator
from collections.abc import Iterable
from typing import NamedTuple, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import TileError

LEVELS: tuple[int, ...] = (4, 6, 8, 10, 12, 14, 16)
LEVEL_STEP = 2  # zooms between two levels: a tile has 4 x 4 child tiles
MAX_ZOOM = 30
MAX_LATITUDE_DEG = 85.0511287798066
EARTH_RADIUS_KM = 6371.0088

# Of the world's width. A point this close to the west or north of a tile's edge belongs to the tile beyond
# it, so that the corner of a tile, computed in float64, is in that tile. mercantile has the same rule and the
# same number.
_EDGE = 1e-14
_MAX_TILES = 4**13  # one array of tiles: 1 GiB

XyArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class LngLat(NamedTuple):
    """A point, in degrees."""

    lng: float
    lat: float


class LngLatBbox(NamedTuple):
    """A box between two meridians and two parallels, in degrees; west > east crosses the antimeridian."""

    west: float
    south: float
    east: float
    north: float


class _TileFields(NamedTuple):
    z: int
    x: int
    y: int


class Tile(_TileFields):
    """The address of one tile, (z, x, y), in XYZ addressing; sorts by z, then x, then y.

    Raises TileError when z is outside [0, MAX_ZOOM], or x or y outside [0, 2^z).
    """

    __slots__ = ()

    def __new__(cls, z: SupportsIndex, x: SupportsIndex, y: SupportsIndex) -> Self:
        """Check the address and make the tile."""
        try:
            z, x, y = operator.index(z), operator.index(x), operator.index(y)
        except TypeError:
            raise TileError(f"a tile needs whole numbers z, x, y; got {z!r}, {x!r}, {y!r}") from None
        n = tile_count(z)
        if not (0 <= x < n and 0 <= y < n):
            raise TileError(f"tile {z}/{x}/{y} is outside zoom {z}: x and y must be in [0, {n})")
        return super().__new__(cls, z, x, y)

    @classmethod
    def _make(cls, iterable: Iterable[int]) -> Self:  # type: ignore[override]  # mypy's own type
        return cls(*iterable)  # the inherited one, which _replace calls too, would not check

    def __str__(self) -> str:
        return f"{self.z}/{self.x}/{self.y}"


def tile_count(z: int) -> int:
    """Return 2^z, the number of columns and of rows at zoom z; z must be in [0, MAX_ZOOM], else TileError."""
    if not 0 <= z <= MAX_ZOOM:
        raise TileError(f"zoom {z} does not exist: a zoom must be in [0, {MAX_ZOOM}]")
    return 1 << operator.index(z)


# --- one tile -----------------------------------------------------------------------------------------------


def tile_at(point: LngLat, z: int) -> Tile:
    """Return the tile of zoom z that contains a point (eq. 5, 6).

    With E and N the Mercator coordinates of eq. 3, 4 in radians, eq. 5 is x = floor((E + pi) / (2 pi / 2^k)).
    Eq. 6 is printed y = floor(2^k - (N + pi) / (2 pi / 2^k)); since the north edge of the map has N = pi,
    this is the usual Web-Mercator row floor(2^k (1 - N / pi) / 2), with the floor around the whole
    difference. (A floor around the fraction alone would give rows 1 to 2^k, each one too far south.) The
    printed form gives 2^k, a row that does not exist, at the south edge; here that edge belongs to the last
    row.

    Latitudes beyond +-MAX_LATITUDE_DEG are clipped to it. Longitudes outside [-180, 180] are wrapped; -180 is
    in the first column, 180 in the last one. Raises TileError when the point is not finite.
    """
    x, y = xy_at(point.lng, point.lat, z)[0]
    return Tile(z, x, y)


def center(tile: Tile) -> LngLat:
    """Return the centre of a tile (eq. 1, 2): half-way between its edges on the map, in degrees."""
    lng, lat = centers(tile.z, [tile[1:]])[0]
    return LngLat(float(lng), float(lat))


def bounds(tile: Tile) -> LngLatBbox:
    """Return the box that a tile covers, in degrees."""
    west, south, east, north = bounds_array(tile.z, [tile[1:]])[0]
    return LngLatBbox(float(west), float(south), float(east), float(north))


def parent(tile: Tile, z: int | None = None) -> Tile:
    """Return the tile of zoom z that contains a tile; without z, two zooms up, the inverse of `children`.

    Raises TileError when z is negative or deeper than the tile.
    """
    z = tile.z - LEVEL_STEP if z is None else z
    if not 0 <= z <= tile.z:
        raise TileError(f"tile {tile} has no parent at zoom {z}: the zoom must be in [0, {tile.z}]")
    return Tile(z, tile.x >> (tile.z - z), tile.y >> (tile.z - z))


def children(tile: Tile) -> tuple[Tile, ...]:
    """Return the 16 tiles (z + 2, 4x + i, 4y + j), i in the outer loop, j in the inner one."""
    return descendants(tile, tile.z + LEVEL_STEP)


def descendants(tile: Tile, z: int) -> tuple[Tile, ...]:
    """Return the tiles of zoom z inside a tile, x in the outer loop, y in the inner one; z >= tile.z."""
    return _tiles(z, descendants_xy([tile[1:]], tile.z, z))


def tms_row(tile: Tile) -> int:
    """Return the row of a tile counted from the south, 2^z - 1 - y, as MBTiles stores it."""
    return tile_count(tile.z) - 1 - tile.y


def quadkey(tile: Tile) -> str:
    """Return the tile's quadkey: z digits, coarse to fine, each x bit + 2 * y bit; "" for zoom 0."""
    bits = range(tile.z - 1, -1, -1)
    return "".join(str((tile.x >> bit & 1) + 2 * (tile.y >> bit & 1)) for bit in bits)


def from_quadkey(key: str) -> Tile:
    """Return the tile of a quadkey; TileError when it has a digit over 3 or more than MAX_ZOOM digits."""
    if len(key) > MAX_ZOOM or not set(key) <= set("0123"):
        raise TileError(f"{key!r} is no quadkey: it must have at most {MAX_ZOOM} digits, each from 0 to 3")
    x = y = 0
    for digit in map(int, key):
        x, y = 2 * x + (digit & 1), 2 * y + (digit >> 1)
    return Tile(len(key), x, y)


def tiles_in_bbox(bbox: LngLatBbox, z: int) -> list[Tile]:
    """Return the tiles of zoom z that overlap a box, columns from west to east, each from north to south.

    See `xy_in_bbox`.
    """
    return list(_tiles(z, xy_in_bbox(bbox, z)))


def great_circle_km(a: LngLat, b: LngLat) -> float:
    """Return the great-circle distance of two points in km, on a sphere of EARTH_RADIUS_KM."""
    return float(great_circle_km_array(a.lng, a.lat, b.lng, b.lat))


def half_diagonal_km(tile: Tile) -> float:
    """Return the great-circle distance in km from a tile's centre to its farthest corner.

    The farthest corners are the two nearest to the equator, where Mercator enlarges least. From zoom 1 on, no
    point of the tile is farther from its centre.
    """
    box, middle = bounds(tile), center(tile)
    return max(great_circle_km(middle, LngLat(box.east, lat)) for lat in (box.south, box.north))


# --- arrays of tiles ----------------------------------------------------------------------------------------


def as_xy(z: int, xy: npt.ArrayLike) -> XyArray:
    """Return tile columns and rows as a checked int64[n, 2].

    Raises TileError when the array has another shape, is not of whole numbers, or a tile is outside zoom z.
    """
    array = np.asarray(xy)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise TileError(f"tiles must be whole numbers of shape (n, 2); got {array.dtype} {array.shape}")
    n = tile_count(z)
    outside = ((array < 0) | (array >= n)).any(axis=1)
    if outside.any():
        x, y = array[int(outside.argmax())]
        raise TileError(f"tile {z}/{x}/{y} is outside zoom {z}: x and y must be in [0, {n})")
    return array.astype(np.int64, copy=False)


def xy_at(lng_deg: npt.ArrayLike, lat_deg: npt.ArrayLike, z: int) -> XyArray:
    """Return the tile of zoom z of each point, int64[n, 2]: the array form of `tile_at`, with its rules."""
    lng, lat = np.broadcast_arrays(np.atleast_1d(_floats(lng_deg)), np.atleast_1d(_floats(lat_deg)))
    n = tile_count(z)
    fraction = np.stack([east_fraction(_wrapped(lng)), south_fraction(lat)], axis=-1)  # (n, 2)
    return np.clip(np.floor((fraction + _EDGE) * n), 0, n - 1).astype(np.int64)


def centers(z: int, xy: npt.ArrayLike) -> FloatArray:
    """Return the centre of each tile (eq. 1, 2), float64[n, 2] with columns (lng, lat) in degrees."""
    n = tile_count(z)
    middle = as_xy(z, xy).astype(np.float64) + 0.5
    return np.stack([_lng_deg(middle[:, 0], n), lat_of_row(middle[:, 1], n)], axis=1)


def bounds_array(z: int, xy: npt.ArrayLike) -> FloatArray:
    """Return the box that each tile covers, float64[n, 4], columns (west, south, east, north) in degrees."""
    array, n = as_xy(z, xy), tile_count(z)
    x, y = array[:, 0], array[:, 1]
    return np.stack([_lng_deg(x, n), lat_of_row(y + 1, n), _lng_deg(x + 1, n), lat_of_row(y, n)], axis=1)


def descendants_xy(xy: npt.ArrayLike, from_z: int, to_z: int) -> XyArray:
    """Return the tiles of zoom to_z inside each tile of zoom from_z, int64[n * 4^(to_z - from_z), 2].

    Row after row of the input; within one, x in the outer loop and y in the inner one. Raises TileError when
    to_z is less than from_z, or when there are more tiles than one array may hold.
    """
    array, deep = as_xy(from_z, xy), tile_count(to_z)
    if to_z < from_z:
        raise TileError(f"tiles of zoom {from_z} have no descendants at zoom {to_z}, which is coarser")
    side = deep >> from_z
    _check_room(len(array) * side * side, to_z)
    step = np.arange(side)
    offsets = np.stack(np.meshgrid(step, step, indexing="ij"), axis=-1).reshape(1, -1, 2)  # (1, side^2, 2)
    return (array[:, None, :] * side + offsets).reshape(-1, 2)


def all_xy(z: int) -> XyArray:
    """Return all tiles of zoom z, int64[4^z, 2], x in the outer loop and y in the inner one; z <= 13."""
    return descendants_xy([(0, 0)], 0, z)


def xy_in_bbox(bbox: LngLatBbox, z: int) -> XyArray:
    """Return the tiles of zoom z that overlap a box, int64[n, 2], column by column.

    Columns go from west to east, each from north to south. west > east means a box across the antimeridian; a
    box 360 degrees or more wide takes every column once. A tile that the box only touches at the box's east
    or south edge is left out, so the bounds of a tile give that tile; a box of no width or height gives the
    tiles that contain it. Latitudes are clipped as in `tile_at`. Raises TileError when the box is not finite,
    when south > north, or when there are more tiles than one array may hold.
    """
    west, south, east, north = _floats(bbox).tolist()
    if south > north:
        raise TileError(f"a box needs south <= north; got south {south}, north {north}")
    n = tile_count(z)
    width = min(east - west, 360.0) if west <= east else (east - west) % 360.0
    west = -180.0 if west == 180.0 and width > 0 else float(_wrapped(west))
    left, top = xy_at(west, north, z)[0].tolist()
    # Across the antimeridian the last column is n or more, and is brought back by the remainder below.
    right = max(left, math.ceil((float(east_fraction(west)) + width / 360.0 - _EDGE) * n) - 1)
    bottom = max(top, math.ceil((float(south_fraction(south)) - _EDGE) * n) - 1)
    columns = min(right - left + 1, n)
    _check_room(columns * (bottom - top + 1), z)
    x, y = np.meshgrid(np.arange(left, left + columns) % n, np.arange(top, bottom + 1), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def great_circle_km_array(
    lng1_deg: npt.ArrayLike, lat1_deg: npt.ArrayLike, lng2_deg: npt.ArrayLike, lat2_deg: npt.ArrayLike
) -> FloatArray:
    """Return great-circle distances in km on a sphere of EARTH_RADIUS_KM (haversine); inputs broadcast."""
    lng1, lat1, lng2, lat2 = (np.radians(_floats(v)) for v in (lng1_deg, lat1_deg, lng2_deg, lat2_deg))
    h = np.sin((lat2 - lat1) / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin((lng2 - lng1) / 2) ** 2
    return np.asarray(2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(h, 0.0, 1.0))), dtype=np.float64)


# --- shared formulas ----------------------------------------------------------------------------------------


def _floats(values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise TileError(f"coordinates must be finite numbers of degrees; got {values!r}")
    return array


def _wrapped(lng: FloatArray | float) -> FloatArray:
    """Bring longitudes into [-180, 180]; those already inside, 180 among them, stay as they are."""
    return np.where(np.abs(lng) <= 180.0, lng, np.mod(np.add(lng, 180.0), 360.0) - 180.0)


def east_fraction(lng: FloatArray | float) -> FloatArray:
    """(E + pi) / 2 pi of eq. 5: 0 at longitude -180, 1 at 180."""
    return np.asarray(np.add(lng, 180.0) / 360.0)


def south_fraction(lat: FloatArray | float) -> FloatArray:
    """1 - (N + pi) / 2 pi of eq. 6, N from eq. 4: 0 at the north edge of the map, 1 at the south edge."""
    phi = np.radians(np.clip(lat, -MAX_LATITUDE_DEG, MAX_LATITUDE_DEG))
    return np.asarray(0.5 - np.log(np.tan(np.pi / 4 + phi / 2)) / (2 * np.pi), dtype=np.float64)


def _lng_deg(column: XyArray | FloatArray, n: int) -> FloatArray:
    """Eq. 2 for any position on the x axis, in tiles."""
    return np.asarray(360.0 * (column / n) - 180.0, dtype=np.float64)


def lat_of_row(row: XyArray | FloatArray, n: int) -> FloatArray:
    """Eq. 1 for any position on the y axis, in tiles."""
    north = 2 * np.pi * (0.5 - row / n)
    return np.asarray(np.degrees(2 * np.arctan(np.exp(north)) - np.pi / 2), dtype=np.float64)


def _tiles(z: int, xy: XyArray) -> tuple[Tile, ...]:
    return tuple(Tile(z, x, y) for x, y in xy.tolist())


def _check_room(count: int, z: int) -> None:
    if count > _MAX_TILES:
        raise TileError(f"{count} tiles of zoom {z} are too many for one array of at most {_MAX_TILES}")
