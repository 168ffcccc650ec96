"""Map tiles of the planet, drawn like a hybrid map: ground, sea, roads, towns, badges and names.

One legend holds at all zooms. The tile of an even zoom L from 2 to 16 is one cell of level L; other zooms are
magnified, reduced or cropped views of cells, so every zoom shows the same world.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from geoengine.engine.sources.planet.colours import MAP_BRIGHT, MAP_DARK, MAP_SYMBOL
from geoengine.engine.sources.planet.names import place_names
from geoengine.engine.sources.planet.noise import (
    Float32Array,
    Int64Array,
    bspline_matrix,
    hash_unit,
    lattice_values,
)
from geoengine.engine.sources.planet.world import World

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]

_GROUND_CELLS = 4  # lattice cells of the ground mosaic per map cell
_ALL = slice(None)
_WARP = 0.055  # of a cell: how far a border between two cells wanders
_KEY_GROUND, _KEY_WARP_X, _KEY_WARP_Y, _KEY_ROAD, _KEY_TOWN = 21, 22, 23, 24, 25
_SEA_RGB = np.array([[58, 96, 140], [66, 108, 150], [80, 126, 164], [104, 150, 180]], dtype=np.uint8)
_SEA_DEPTHS = np.array([-0.35, -0.15, -0.05], dtype=np.float32)
# Badges of a place and the regions it lies in, its own first: (left, top) of up to eight, as cell shares.
_BADGE_SIZE = (0.205, 0.17)
_BADGES = tuple((0.045 + 0.235 * column, top) for top in (0.795, 0.035) for column in range(4))


def render_cells(world: World, level: int, xy: Int64Array, size: int) -> UInt8Array:
    """Draw the cells `xy` (int64[n, 2]) of an even `level` from 2 to 16, as RGB uint8[n, size, size, 3]."""
    kind = world.land_kind(level, xy).tolist()
    pictures = np.empty((len(xy), size, size, 3), dtype=np.uint8)
    heights: dict[int, Float32Array | None] = {}  # of the cells that have land; None where they have no sea
    for i, (x, y) in enumerate(xy.tolist()):
        height = None if kind[i] == 1 else world.elevation_grid(level, x, y, size)
        if height is None or height.min() > 0:
            heights[i] = None
        elif height.max() > 0:
            heights[i] = height
        else:
            pictures[i] = _sea_colours(height)
    if heights:
        land = list(heights)
        pictures[land] = _draw_land(world, level, xy[land], list(heights.values()), size)
    for picture in pictures:
        _add_grain(picture)
    return pictures


def _draw_land(
    world: World, level: int, xy: Int64Array, heights: Sequence[Float32Array | None], size: int
) -> UInt8Array:
    """Draw cells that have land: ground, roads, sea where the height says so, then what is printed on top."""
    pictures = _ground(world, level, xy, size)
    symbol = MAP_SYMBOL.rgb(world.ancestor_hues(level, xy))  # (n, levels, 2, 3)
    towns, roads = _towns(world, level, xy), _roads(world, level, xy)
    names = place_names(world.seed, level, xy)
    highways = _roads(world, level - 2, xy >> 2) * 4 - (xy & 3)[:, None, None] if level >= 4 else roads[:, :0]
    for i, (picture, height) in enumerate(zip(pictures, heights, strict=True)):
        _draw_roads(picture, highways[i], _up(symbol[i], 2), max(1, size // 48))
        _draw_roads(picture, roads[i], _up(symbol[i], 1), max(1, round(size * 0.055)))
        if height is not None:
            np.copyto(picture, _sea_colours(height), where=(height <= 0)[..., None])
        _draw_symbols(picture, towns[i] * size, symbol[i], names[i])
    return pictures


def _sea_colours(height: Float32Array) -> UInt8Array:
    """Return the sea's colours by depth, uint8[size, size, 3]."""
    depth = sum((height >= limit).view(np.uint8) for limit in _SEA_DEPTHS)
    return np.asarray(_SEA_RGB[depth])


def _up(colours: Float32Array, levels: int) -> Float32Array:
    """Return the two colours, float32[2, 3], of the ancestor `levels` levels up, or of the topmost."""
    return np.asarray(colours[max(0, len(colours) - 1 - levels)])


def _ground(world: World, level: int, xy: Int64Array, size: int) -> UInt8Array:
    """Draw the mosaic of bright `a` and dark `b`, with neighbours' colours where a border wanders in."""
    ground = world.seed * 64 + _KEY_GROUND
    mosaic = _field(ground, level, xy * _GROUND_CELLS, _GROUND_CELLS, size) > 0
    child = _field(ground, level + 2, xy * 4 * _GROUND_CELLS, 4 * _GROUND_CELLS, size)
    parent = _field(ground, level - 2, xy * _GROUND_CELLS // 4, _GROUND_CELLS // 4, size) > 0
    bump, child_cell, stripes = _pixel_tables(size)
    cell = _cells_at_pixels(world, level, xy, size)
    index = np.where(
        np.abs(child) * bump > 0.34, 18 + child_cell * 2 + (child > 0), 8 + mosaic.view(np.uint8)
    )
    beyond = cell != 4
    index[beyond] = cell[beyond] * 2 + mosaic[beyond]
    index += parent * np.uint8(50)
    if level >= 12:
        index += (stripes & mosaic) * np.uint8(100)
    pictures = np.empty((len(xy), size, size, 3), dtype=np.uint8)
    for classes, legend, picture in zip(index, _legend(world, level, xy), pictures, strict=True):
        cv2.LUT(cv2.cvtColor(classes, cv2.COLOR_GRAY2RGB), legend, picture)
    return pictures


def _cells_at_pixels(world: World, level: int, xy: Int64Array, size: int) -> UInt8Array:
    """Return which of the 3 x 3 cells around each pixel shows, row by row, 4 its own; uint8[n, size, size].

    Borders wander by at most `_WARP`, so only strips along the edges are looked at.
    """
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    strip = np.flatnonzero(np.abs(centres - 0.5) > 0.5 - _WARP)
    cell = np.full((len(xy), size, size), 4, dtype=np.uint8)
    start = xy * _GROUND_CELLS
    across = _field(world.seed * 64 + _KEY_WARP_X, level, start, _GROUND_CELLS, size, columns=strip)
    across = across * _WARP + centres[strip]
    cell[:, :, strip] += (across >= 1).view(np.uint8) - (across < 0).view(np.uint8)
    down = _field(world.seed * 64 + _KEY_WARP_Y, level, start, _GROUND_CELLS, size, rows=strip)
    down = down * _WARP + centres[strip, None]
    cell[:, strip] += 3 * ((down >= 1).view(np.uint8) - (down < 0).view(np.uint8))
    return cell


def _legend(world: World, level: int, xy: Int64Array) -> UInt8Array:
    """Return the colours of all ground classes, uint8[n, 1, 256, 3]: by stripe, shade, cell or child, hue."""
    n = len(xy)
    offset = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(9, 2)  # row by row, (x, y)
    around = world.hues(level, (xy[:, None] + offset).reshape(-1, 2)).reshape(n, 9, 2)
    inner = np.stack(np.meshgrid(range(4), range(4), indexing="xy"), axis=-1).reshape(16, 2)
    children = world.hues(level + 2, (xy[:, None] * 4 + inner).reshape(-1, 2)).reshape(n, 16, 2)
    hues = np.concatenate([around, children], axis=1)  # (n, 25, 2)
    colour = np.stack([MAP_DARK.rgb(hues[..., 1]), MAP_BRIGHT.rgb(hues[..., 0])], axis=2).reshape(n, 50, 3)
    shades = [colour * factor for factor in (0.95, 1.03, 0.87, 0.95)]
    legend = np.zeros((n, 1, 256, 3), dtype=np.uint8)
    legend[:, 0, :200] = np.clip(np.concatenate(shades, axis=1), 0, 255)
    return legend


def _field(
    key: int,
    level: int,
    start: Int64Array,
    extent: int,
    size: int,
    *,
    rows: Int64Array | slice = _ALL,
    columns: Int64Array | slice = _ALL,
) -> Float32Array:
    """Sample the noise that level `level` has four lattice cells of per map cell, float32[n, rows, columns].

    A window starts at `start`, int64[n, 2] in lattice cells, and `extent` of them are `size` pixels, of which
    the given rows and columns are sampled.
    """
    first, matrix = bspline_matrix(0.0, extent / size, size)
    taps = first + np.arange(matrix.shape[1])
    lattice_columns = (start[:, 0, None, None] + taps) % (_GROUND_CELLS << level)
    lattice_rows = start[:, 1, None, None] + taps[:, None]
    values = lattice_values(key, level, lattice_columns, lattice_rows)  # (n, taps, taps)
    return np.asarray(matrix[rows] @ values @ matrix[columns].T, dtype=np.float32)


@lru_cache(maxsize=8)
def _pixel_tables(size: int) -> tuple[Float32Array, UInt8Array, npt.NDArray[np.bool_]]:
    """Return each pixel's weight for blobs, 0 along child borders, its child cell, whether striped."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    edge = np.clip(np.sin(np.pi * (centres * 4 % 1)) * 1.6, 0, 1)
    child = (centres * 4).astype(np.uint8)
    diagonal = (centres + centres[:, None]) * 14 % 1
    return np.outer(edge, edge), child[:, None] * 4 + child, diagonal < 0.4


def _draw_roads(picture: UInt8Array, roads: FloatArray, colours: Float32Array, width: int) -> None:
    """Draw a west-east and a north-south road, float64[2, 3, 2] in cell units, in two colours."""
    for road, colour in zip(roads, colours.tolist(), strict=False):
        fixed = np.round(road * picture.shape[0] * 16 - 8).astype(np.int32)[None]
        cv2.polylines(picture, fixed, False, (52, 48, 50), width + 2, cv2.LINE_AA, 4)
        cv2.polylines(picture, fixed, False, colour, width, cv2.LINE_AA, 4)


def _towns(world: World, level: int, xy: Int64Array) -> FloatArray:
    """Return where the towns of cells stand, float64[n, 2] in cell units."""
    hashed = hash_unit(world.seed, _KEY_TOWN, level, xy[:, :1], xy[:, 1:], np.arange(2))
    return 0.46 + 0.08 * hashed.astype(np.float64)


def _roads(world: World, level: int, xy: Int64Array) -> FloatArray:
    """Return the west-east and the north-south road of cells, float64[n, 2, 3, 2] in cell units.

    Roads lead from edge to edge through the town. They cross an edge where the hash of that edge says, and so
    meet the neighbours' roads.
    """
    x, y, ends = xy[:, :1], xy[:, 1:], np.arange(2)
    roads = np.empty((len(xy), 2, 3, 2))
    roads[:, :, 1] = _towns(world, level, xy)[:, None]
    roads[:, 0, ::2, 0] = roads[:, 1, ::2, 1] = ends
    roads[:, 0, ::2, 1] = 0.4 + 0.2 * hash_unit(world.seed, _KEY_ROAD, level, 0, (x + ends) % (1 << level), y)
    roads[:, 1, ::2, 0] = 0.4 + 0.2 * hash_unit(world.seed, _KEY_ROAD, level, 1, x, y + ends)
    return roads


def _draw_symbols(picture: UInt8Array, town: FloatArray, colours: Float32Array, name: str) -> None:
    """Draw the town ring in the grandparent's colours, a badge for the place and each ancestor, the name."""
    size = picture.shape[0]
    point = (round(float(town[0])), round(float(town[1])))
    radius = max(2, round(size * 0.115))
    top, bottom = _up(colours, 2).tolist()
    cv2.circle(picture, point, radius + max(1, size // 56), (250, 250, 250), -1, cv2.LINE_AA)
    cv2.ellipse(picture, point, (radius, radius), 0, 180, 360, top, -1, cv2.LINE_AA)
    cv2.ellipse(picture, point, (radius, radius), 0, 0, 180, bottom, -1, cv2.LINE_AA)
    for (left, high), pair in zip(_BADGES, colours[::-1].tolist(), strict=False):
        _badge(picture, left * size, high * size, pair)
    if size >= 64:
        _name(picture, name, (size * 0.06, size * 0.735))


def _badge(picture: UInt8Array, left: float, top: float, colours: list[list[float]]) -> None:
    size = picture.shape[0]
    width, height = _BADGE_SIZE[0] * size, _BADGE_SIZE[1] * size
    x0, y0, x1, y1 = round(left), round(top), round(left + width), round(top + height)
    middle = round(top + height / 2)
    cv2.rectangle(picture, (x0 - 1, y0 - 1), (x1, y1), (245, 245, 245), -1)
    picture[y0:middle, x0:x1] = np.array(colours[0], dtype=np.uint8)
    picture[middle:y1, x0:x1] = np.array(colours[1], dtype=np.uint8)


def _name(picture: UInt8Array, text: str, corner: tuple[float, float]) -> None:
    scale = picture.shape[0] / 300
    x, y = round(corner[0]), round(corner[1])
    for offset, colour in ((1, (40, 40, 40)), (0, (250, 250, 250))):
        cv2.putText(
            picture, text, (x + offset, y + offset), cv2.FONT_HERSHEY_DUPLEX, scale, colour, 1, cv2.LINE_AA
        )


def _add_grain(picture: UInt8Array) -> None:
    """Add fine texture, the same in every tile, so that it has no seams either."""
    lighter, darker = _grain_tables(picture.shape[0])
    cv2.add(picture, lighter, picture)
    cv2.subtract(picture, darker, picture)


@lru_cache(maxsize=8)
def _grain_tables(size: int) -> tuple[UInt8Array, UInt8Array]:
    noise = np.random.default_rng(5).normal(0, 4, (size, size, 1)).repeat(3, axis=2)
    return np.clip(noise, 0, 255).astype(np.uint8), np.clip(-noise, 0, 255).astype(np.uint8)
