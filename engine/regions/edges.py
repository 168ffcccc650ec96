"""Edges of polygons on the tile grid: which tiles they pass through, and which tiles they enclose.

Edges are straight in degrees, as GeoJSON's are (RFC 7946, 3.1.1). A point moves along an edge by a parameter
t in [0, 1] in which both longitude and latitude are linear, so crossings with the meridians and parallels of
the grid have exact formulas, however the map bends between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import TileError
from geoengine.engine.tiles import (
    MAX_LATITUDE_DEG,
    FloatArray,
    XyArray,
    east_fraction,
    lat_of_row,
    south_fraction,
    tile_count,
)

IntArray: TypeAlias = npt.NDArray[np.int64]
Edges: TypeAlias = FloatArray
"""float64[e, 4], (lng, lat) of the start and of the end, in degrees; the inside is on the left."""

MOST_TILES = 4**13
_INWARD = 1e-7  # tiles: by how much less than that a region may overlap a tile that is left out


def ring_edges(ring: FloatArray, *, hole: bool) -> Edges:
    """Return the edges of a closed ring, float64[k, 2] with columns (lng, lat), with the inside on the left.

    Longitudes may run past 180. Parts beyond the map's latitudes are cut off.
    """
    lng, lat = ring.T
    doubled_area = float((lng[:-1] * lat[1:] - lng[1:] * lat[:-1]).sum())
    if (doubled_area < 0) != hole:  # clockwise
        ring = ring[::-1]
    edges = np.hstack([ring[:-1], ring[1:]])
    edges = edges[(edges[:, :2] != edges[:, 2:]).any(axis=1)]
    return _within_the_map(edges)


def _within_the_map(edges: Edges) -> Edges:
    lat = edges[:, 1::2]
    if np.abs(lat).max(initial=0) <= MAX_LATITUDE_DEG:
        return edges
    rise = lat[:, 1] - lat[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = (np.array([[-MAX_LATITUDE_DEG], [MAX_LATITUDE_DEG]]) - lat[:, 0]) / rise  # (2, e)
    level = rise == 0
    at[:, level] = [[-np.inf], [np.inf]]
    start, end = np.clip(at.min(axis=0), 0, 1), np.clip(at.max(axis=0), 0, 1)
    kept = (end > start) & ~(level & (np.abs(lat[:, 0]) > MAX_LATITUDE_DEG))
    return np.hstack([_at(edges[kept], start[kept]), _at(edges[kept], end[kept])])


def _at(edges: Edges, t: FloatArray) -> FloatArray:
    """Return the points (lng, lat) at t on the edges, float64[e, 2]; exact at 0 and 1."""
    a, b = edges[:, :2], edges[:, 2:]
    t = t[:, None]
    return np.where(t < 0.5, a + (b - a) * t, b - (b - a) * (1 - t))


def passed(edges: Edges, z: int) -> XyArray:
    """Return the tiles of zoom z that the inner side of the edges runs through, some of them twice.

    Columns may be outside [0, 2^z) where longitudes run past 180.
    """
    n = tile_count(z)
    ends = _on_grid(edges, n)
    x, y, lat = ends[:, 0::2], ends[:, 1::2], edges[:, 1::2]
    of_x, column = _whole_numbers(x)
    of_y, row = _whole_numbers(y)
    if len(column) + len(row) + len(edges) > MOST_TILES:
        raise TileError(f"the region's border runs through too many tiles of zoom {z}: search fewer zooms")
    t = np.concatenate(
        [
            np.zeros(len(edges)),
            (column - x[of_x, 0]) / (x[of_x, 1] - x[of_x, 0]),
            (lat_of_row(row, n) - lat[of_y, 0]) / (lat[of_y, 1] - lat[of_y, 0]),
            np.ones(len(edges)),
        ]
    )
    all_edges = np.arange(len(edges))
    of = np.concatenate([all_edges, of_x, of_y, all_edges])
    order = np.lexsort((t, of))
    t, of = np.clip(t[order], 0, 1), of[order]
    pieces = np.flatnonzero(of[1:] == of[:-1])
    of, middle = of[pieces], (t[pieces] + t[pieces + 1]) / 2
    points = _at(edges[of], middle)
    steps = np.stack([x[of, 1] - x[of, 0], y[of, 1] - y[of, 0]], axis=1)
    steps /= np.maximum(np.hypot(*steps.T), 1e-300)[:, None]
    # y grows southwards: the left of (dx, dy) is (dy, -dx).
    inside = np.stack([steps[:, 1], -steps[:, 0]], axis=1) * _INWARD
    places = np.stack([east_fraction(points[:, 0]), south_fraction(points[:, 1])], axis=1) * n + inside
    cells = np.floor(places).astype(np.int64)
    cells[:, 1] = np.clip(cells[:, 1], 0, n - 1)
    return cells


def enclosed(edges: Edges, z: int) -> XyArray:
    """Return the tiles of zoom z whose centres the edges enclose; columns as in `passed`.

    A centre is inside where the edges wind round it, so that polygons that overlap are one.
    """
    n = tile_count(z)
    ends = _on_grid(edges, n)
    of, row = _whole_numbers(ends[:, 1::2] - 0.5, half_open=True)
    lat = edges[of, 1::2]
    t = (lat_of_row(row.astype(np.float64) + 0.5, n) - lat[:, 0]) / (lat[:, 1] - lat[:, 0])
    column = east_fraction(_at(edges[of], t)[:, 0]) * n - 0.5
    turn = np.where(ends[of, 3] > ends[of, 1], 1, -1)
    order = np.lexsort((column, row))
    row, column = row[order], column[order]
    inside = np.flatnonzero(np.cumsum(turn[order]) != 0)  # between this crossing and the next one
    first = np.ceil(column[inside]).astype(np.int64)
    count = np.ceil(column[inside + 1]).astype(np.int64) - first
    if count.sum() > MOST_TILES:
        raise TileError(f"the region has {count.sum()} tiles of zoom {z}: at most {MOST_TILES} can be listed")
    return np.stack([_runs(first, count), np.repeat(row[inside], count)], axis=1)


def winds_round(edges: Edges, points: FloatArray) -> npt.NDArray[np.bool_]:
    """Tell which points float64[p, 2], columns (lng, lat), the edges enclose, bool[p]; takes p * e memory."""
    south, north = np.minimum(edges[:, 1], edges[:, 3]), np.maximum(edges[:, 1], edges[:, 3])
    lng, lat = points[:, :1], points[:, 1:]
    spans = (south <= lat) & (lat < north)  # (p, e)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = edges[:, 0] + (lat - edges[:, 1]) / (edges[:, 3] - edges[:, 1]) * (
            edges[:, 2] - edges[:, 0]
        )
    turns = np.where(edges[:, 3] < edges[:, 1], 1, -1)
    return np.asarray(np.where(spans & (crossing < lng), turns, 0).sum(axis=1) != 0)


def pack(xy: XyArray) -> IntArray:
    """Return one sortable number for each tile of a zoom, int64[n]."""
    return xy[:, 0] << 32 | xy[:, 1]


def distinct(z: int, parts: Sequence[XyArray]) -> IntArray:
    """Return the packed tiles of all parts, sorted, each once, with their columns brought onto the map."""
    n = tile_count(z)
    packed = np.sort(np.concatenate([(part[:, 0] % n) << 32 | part[:, 1] for part in parts]))
    # np.unique hashes whole numbers, which takes four times as long.
    return np.asarray(packed[np.concatenate([[True], packed[1:] != packed[:-1]])[: len(packed)]])


def _on_grid(edges: Edges, n: int) -> FloatArray:
    """Return the ends of the edges in tiles, float64[e, 4]."""
    grid = np.empty_like(edges)
    grid[:, 0::2] = east_fraction(edges[:, 0::2]) * n
    grid[:, 1::2] = south_fraction(edges[:, 1::2]) * n
    return grid


def _whole_numbers(ends: FloatArray, *, half_open: bool = False) -> tuple[IntArray, IntArray]:
    """Return the whole numbers between the two ends of each row, and the row that each belongs to.

    Both ends are left out, or with `half_open` the larger one.
    """
    low, high = ends.min(axis=1), ends.max(axis=1)
    first = (np.ceil(low) if half_open else np.floor(low) + 1).astype(np.int64)
    count = np.maximum(np.ceil(high).astype(np.int64) - first, 0)
    return np.repeat(np.arange(len(ends)), count), _runs(first, count)


def _runs(first: IntArray, count: IntArray) -> IntArray:
    """Return first[i], first[i] + 1, ..., count[i] numbers for each i, one after the other."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count - first, count)
