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
    heights = [
        None if only_land == 1 else world.elevation_grid(level, x, y, size)
        for only_land, (x, y) in zip(kind, xy.tolist(), strict=True)
    ]
    pictures = np.empty((len(xy), size, size, 3), dtype=np.uint8)
    land = []
    for i, height in enumerate(heights):
        if height is None or bool((height > 0).any()):
            land.append(i)
        else:
            pictures[i] = _sea_colours(height)
    if land:
        pictures[land] = _draw_land(world, level, xy[land], [heights[i] for i in land], size)
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
    mosaic = _field(world, _KEY_GROUND, level, xy, _GROUND_CELLS, size)
    child = _field(world, _KEY_GROUND, level + 2, xy * 4, _GROUND_CELLS, size, cells=4)
    parent = _parent_field(world, level, xy, size)
    warp_x = _field(world, _KEY_WARP_X, level, xy, _GROUND_CELLS, size) * _WARP
    warp_y = _field(world, _KEY_WARP_Y, level, xy, _GROUND_CELLS, size) * _WARP
    centres, bump, child_cell, stripes = _pixel_tables(size)
    across, down = warp_x + centres, warp_y + centres[:, None]
    index = 18 + child_cell * 2 + (child > 0)
    unlike = (np.abs(child) * bump <= 0.34) | (across >= 1) | (across < 0) | (down >= 1) | (down < 0)
    column = 1 + (across >= 1).view(np.int8) - (across < 0).view(np.int8)
    row = 1 + (down >= 1).view(np.int8) - (down < 0).view(np.int8)
    np.copyto(index, ((row * 3 + column) * 2 + (mosaic > 0)).view(np.uint8), where=unlike)
    index += (parent > 0) * np.uint8(50)
    if level >= 12:
        index += (stripes & (mosaic > 0)) * np.uint8(100)
    pictures = np.empty((len(xy), size, size, 3), dtype=np.uint8)
    for classes, legend, picture in zip(index, _legend(world, level, xy), pictures, strict=True):
        cv2.LUT(cv2.cvtColor(classes, cv2.COLOR_GRAY2RGB), legend, picture)
    return pictures


def _legend(world: World, level: int, xy: Int64Array) -> UInt8Array:
    """Return the colours of all ground classes, uint8[n, 1, 256, 3]: by stripe, shade, cell or child, hue."""
    n = len(xy)
    offset = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="xy"), axis=-1).reshape(
        9, 2
    )  # row-major, (x, y)
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
    world: World, key: int, level: int, xy: Int64Array, per_cell: int, size: int, *, cells: int = 1
) -> Float32Array:
    """Sample value noise in windows of `cells` x `cells` cells that start at `xy`; float32[n, size, size]."""
    first, matrix = bspline_matrix(0.0, cells * per_cell / size, size)
    taps = first + np.arange(matrix.shape[1])
    columns = (xy[:, 0, None, None] * per_cell + taps) % (per_cell << level)
    rows = xy[:, 1, None, None] * per_cell + taps[:, None]
    values = lattice_values(world.seed * 64 + key, level, columns, rows)  # (n, taps, taps)
    return np.asarray(matrix @ values @ matrix.T, dtype=np.float32)


def _parent_field(world: World, level: int, xy: Int64Array, size: int) -> Float32Array:
    """Sample the parent's mosaic field inside each cell; float32[n, size, size]."""
    first, matrix = bspline_matrix(0.0, _GROUND_CELLS / 4 / size, size)
    taps = first + np.arange(matrix.shape[1])
    columns = (xy[:, 0, None, None] + taps) % (_GROUND_CELLS << (level - 2))
    values = lattice_values(
        world.seed * 64 + _KEY_GROUND, level - 2, columns, xy[:, 1, None, None] + taps[:, None]
    )
    return np.asarray(matrix @ values @ matrix.T, dtype=np.float32)


@lru_cache(maxsize=8)
def _pixel_tables(
    size: int,
) -> tuple[Float32Array, Float32Array, UInt8Array, npt.NDArray[np.bool_]]:
    """Pixel centres in cell units, the window that keeps blobs inside child cells, child numbers, stripes."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    edge = np.clip(np.sin(np.pi * (centres * 4 % 1)) * 1.6, 0, 1)
    child = (centres * 4).astype(np.uint8)
    diagonal = (centres + centres[:, None]) * 14 % 1
    return centres, np.outer(edge, edge), child[:, None] * 4 + child, diagonal < 0.4


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
