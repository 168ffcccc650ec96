"""Regions made of polygons."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from geoengine.engine.regions.edges import (
    Edges,
    IntArray,
    distinct,
    enclosed,
    pack,
    passed,
    winds_round,
)
from geoengine.engine.tiles import XyArray, centers, south_fraction, tile_count

_BASE = 10  # deeper tiles are looked up by their parents of this zoom, of which few lie on a border


class Polygons:
    """A region with borders: all tiles whose inside it overlaps by more than 1e-7 of their width.

    `edges` are those of all polygons, as `ring_edges` makes them; polygons may overlap.
    """

    def __init__(self, name: str, edges: Edges, *, of_earth: bool) -> None:
        self.name, self.of_earth = name, of_earth
        self._edges = edges
        self._known: dict[int, IntArray] = {}

    def tiles(self, z: int) -> XyArray:
        """Return the tiles of zoom z that the region overlaps, int64[n, 2], sorted by x, then y."""
        packed = self._packed(z)
        return np.stack([packed >> 32, packed & 0xFFFFFFFF], axis=1)

    def intersects(self, z: int, xy: XyArray) -> npt.NDArray[np.bool_]:
        """Tell which of the tiles int64[n, 2] the region overlaps, bool[n]."""
        if z <= _BASE:
            return np.isin(pack(xy), self._packed(z))
        base = xy >> (z - _BASE)
        keys = pack(base)
        inside = np.isin(keys, self._packed(_BASE))
        near = np.flatnonzero(inside & np.isin(keys, self._border))
        for row in np.unique(base[near, 1]).tolist():
            these = near[base[near, 1] == row]
            inside[these] = self._near_the_border(z, xy[these], row)
        return inside

    def _packed(self, z: int) -> IntArray:
        if z not in self._known:
            self._known[z] = distinct(z, [passed(self._edges, z), enclosed(self._edges, z)])
        return self._known[z]

    @cached_property
    def _border(self) -> IntArray:
        return distinct(_BASE, [passed(self._edges, _BASE)])

    @cached_property
    def _rows(self) -> tuple[IntArray, IntArray]:
        """The first and the last row of zoom _BASE that each edge is in."""
        n = tile_count(_BASE)
        rows = np.clip(np.floor(south_fraction(self._edges[:, 1::2]) * n).astype(np.int64), 0, n - 1)
        return rows.min(axis=1), rows.max(axis=1)

    def _near_the_border(self, z: int, xy: XyArray, base_row: int) -> npt.NDArray[np.bool_]:
        """Tell it for tiles that all lie in one row of zoom _BASE."""
        first, last = self._rows
        # A row more on each side: an edge on the line between two rows has its inside in either.
        edges = self._edges[(first <= base_row + 1) & (last >= base_row - 1)]
        inside = np.isin(pack(xy), distinct(z, [passed(_beside(edges, z, xy), z)]))
        rest = np.flatnonzero(~inside)
        middle = centers(z, xy[rest])
        for turn in self._turns:
            inside[rest] |= winds_round(edges, middle + np.array([turn, 0.0]))
        return inside

    @cached_property
    def _turns(self) -> tuple[float, ...]:
        """What to add to longitudes of the map to meet edges that run past 180 or -180."""
        lng = self._edges[:, 0::2]
        west, east = lng.min(initial=0), lng.max(initial=0)
        return tuple(turn for turn in (-360.0, 0.0, 360.0) if west <= turn + 180 and turn - 180 <= east)


def _beside(edges: Edges, z: int, xy: XyArray) -> Edges:
    """Return the edges that share a column of zoom _BASE with one of the tiles."""
    n = tile_count(_BASE)
    columns = np.unique(xy[:, 0] >> (z - _BASE))
    columns = np.concatenate([columns - n, columns, columns + n])
    ends = (edges[:, 0::2] + 180.0) / 360.0 * n
    west = np.floor(ends.min(axis=1) - 0.5).astype(np.int64)
    east = np.floor(ends.max(axis=1) + 0.5).astype(np.int64)
    some = np.searchsorted(columns, west) < np.searchsorted(columns, east, side="right")
    return np.asarray(edges[some])
