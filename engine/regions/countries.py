"""Countries and land, from Natural Earth's borders (public domain, scale 1:10 million) in countries.npz.

The borders are good to about half a kilometre. They show who is in control of a place, as Natural Earth sees
it; far-away parts of a country (French Guiana, Svalbard) belong to it where ISO 3166 has codes of their own.
`engine/data/make_countries.py` makes the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geoengine.engine.regions import RegionError
from geoengine.engine.regions.edges import Edges, IntArray, pack, ring_edges
from geoengine.engine.regions.polygons import Polygons
from geoengine.engine.tiles import FloatArray, XyArray, descendants_xy, tile_count

_FILE = Path(__file__).parent.parent / "data" / "countries.npz"
_ANTARCTICA = "AQ"
_LAND_ZOOM = 10  # below it, land is what lies in a land tile of this zoom


class _Borders(NamedTuple):
    countries: npt.NDArray[np.str_]  # (countries, 3): two letters, three letters, name
    arcs: tuple[FloatArray, ...]  # (points, 2) each, degrees
    rings: tuple[IntArray, ...]  # arcs; ~i is arc i from its end
    ring_country: npt.NDArray[np.int16]
    ring_is_hole: npt.NDArray[np.bool_]


def country(code: str) -> Polygons:
    """Return a country by its ISO 3166-1 code of two or three letters; RegionError when there is none."""
    borders = _borders()
    letters = code.upper()
    numbers = np.flatnonzero((borders.countries[:, :2] == letters).any(axis=1))
    if not len(numbers):
        known = " ".join(sorted(set(borders.countries[:, 0].tolist()) - {""}))
        raise RegionError(
            f"there are no borders for a country with the ISO 3166 code {code}; there are {known}"
        )
    name = f"{borders.countries[numbers[0], 0]} ({borders.countries[numbers[0], 2]})"
    return Polygons(name, np.concatenate(list(_country_edges(numbers))), of_earth=True)


def outlines() -> tuple[FloatArray, ...]:
    """Return all coasts and borders for drawing, each once, float64[points, 2] in degrees."""
    return _borders().arcs


class Land:
    """All land but Antarctica, with a margin of one tile around it."""

    name = "land"
    of_earth = True

    def tiles(self, z: int) -> XyArray:
        """Return the land tiles of zoom z and their neighbours, int64[n, 2], sorted.

        Below zoom 10, these are the tiles in the land tiles of that zoom. Raises TileError when there are
        more than one array may hold, at zoom 15 and below.
        """
        packed = _land(min(z, _LAND_ZOOM))
        if z > _LAND_ZOOM:
            coarse = np.stack([packed >> 32, packed & 0xFFFFFFFF], axis=1)
            packed = np.sort(pack(descendants_xy(coarse, _LAND_ZOOM, z)))
        return np.stack([packed >> 32, packed & 0xFFFFFFFF], axis=1)

    def intersects(self, z: int, xy: XyArray) -> npt.NDArray[np.bool_]:
        """Tell which of the tiles int64[n, 2] are land; below zoom 10, which lie in a land tile of that."""
        above = max(0, z - _LAND_ZOOM)
        return np.isin(pack(xy >> above), _land(z - above))


@lru_cache
def _land(z: int) -> IntArray:
    """Return the packed tiles of land and of its margin, sorted."""
    n = tile_count(z)
    land = _bare_land().reshape(n, tile_count(_LAND_ZOOM) // n, n, -1).any(axis=(1, 3))  # (columns, rows)
    land = land | np.roll(land, 1, axis=0) | np.roll(land, -1, axis=0)
    margin = land.copy()
    margin[:, 1:] |= land[:, :-1]
    margin[:, :-1] |= land[:, 1:]
    return pack(np.argwhere(margin))


@lru_cache(maxsize=1)
def _bare_land() -> npt.NDArray[np.bool_]:
    """Return which tiles of the deepest zoom are land, bool[columns, rows]."""
    numbers = np.flatnonzero(_borders().countries[:, 0] != _ANTARCTICA)
    xy = Polygons("", np.concatenate(list(_country_edges(numbers))), of_earth=True).tiles(_LAND_ZOOM)
    n = tile_count(_LAND_ZOOM)
    land = np.zeros((n, n), dtype=bool)
    land[tuple(xy.T)] = True
    return land


def _country_edges(numbers: IntArray) -> Iterator[Edges]:
    borders = _borders()
    for ring in np.flatnonzero(np.isin(borders.ring_country, numbers)).tolist():
        arcs = [borders.arcs[i] if i >= 0 else borders.arcs[~i][::-1] for i in borders.rings[ring].tolist()]
        points = np.concatenate([arcs[0], *(arc[1:] for arc in arcs[1:])])
        yield ring_edges(_unwrapped(points), hole=bool(borders.ring_is_hole[ring]))


def _unwrapped(points: FloatArray) -> FloatArray:
    """Let longitudes run past 180 where a ring crosses the antimeridian, and go by the pole it runs round."""
    lng = np.unwrap(points[:, 0], period=360.0)
    ring = np.stack([lng, points[:, 1]], axis=1)
    if abs(lng[-1] - lng[0]) < 180:
        return ring
    pole = np.copysign(90.0, points[0, 1])
    return np.concatenate([ring, [(lng[-1], pole), (lng[0], pole), ring[0]]])


@lru_cache(maxsize=1)
def _borders() -> _Borders:
    with np.load(_FILE, allow_pickle=False) as data:
        planes = np.ascontiguousarray(data["planes"].transpose(1, 2, 0)).view("<u4")[..., 0]  # (2, points)
        zigzag = planes.T.astype(np.int64)
        steps = (zigzag >> 1) ^ -(zigzag & 1)
        arc_ends = np.cumsum(data["arc_lengths"])
        ring_ends = np.cumsum(data["ring_lengths"])
        scale, translate = data["scale"], data["translate"]
        return _Borders(
            countries=data["countries"],
            arcs=tuple(
                np.cumsum(part, axis=0) * scale + translate for part in np.split(steps, arc_ends[:-1])
            ),
            rings=tuple(np.split(data["ring_arcs"].astype(np.int64), ring_ends[:-1])),
            ring_country=data["ring_country"],
            ring_is_hole=data["ring_is_hole"],
        )
