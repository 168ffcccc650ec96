"""Answers no more precise than they may be: tiles, places and radii of at least some size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.regions import Region
from geoengine.engine.results import Candidate, Level, Location, ScoredTile
from geoengine.engine.tiles import (
    MAX_ZOOM,
    LngLat,
    Tile,
    XyArray,
    center,
    descendants_xy,
    half_diagonal_km,
    parent,
    tile_at,
)


def deepest_zoom(km: float) -> int:
    """Return the deepest zoom that has a tile with all of its centre's surroundings of `km` km, or 0.

    Tiles are largest at the equator.
    """
    zoom = 0
    while zoom < MAX_ZOOM and half_diagonal_km(tile_at(LngLat(0.0, 0.0), zoom + 1)) >= km:
        zoom += 1
    return zoom


def coarse_tile(tile: Tile, km: float) -> Tile:
    """Return the smallest tile around `tile` whose corners are at least `km` km from its centre."""
    while tile.z > 0 and half_diagonal_km(tile) < km:
        tile = parent(tile, tile.z - 1)
    return tile


@dataclass(frozen=True, slots=True)
class CoarseRegion:
    """All coarse tiles that a region overlaps: asking within smaller and smaller ones must find no place."""

    region: Region
    km: float

    @property
    def name(self) -> str:
        """The region's."""
        return self.region.name

    @property
    def of_earth(self) -> bool:
        """Whether it means a place on Earth."""
        return self.region.of_earth

    def tiles(self, z: int) -> XyArray:
        """Return the tiles of zoom z in it, int64[n, 2], sorted; see `Region`."""
        inside = [
            descendants_xy(np.unique(coarse, axis=0), zoom, z)
            for zoom, _, coarse in _by_zoom(z, self.region.tiles(z), self.km)
        ]
        return np.unique(np.concatenate(inside or [np.empty((0, 2), np.int64)]), axis=0)

    def intersects(self, z: int, xy: XyArray) -> NDArray[np.bool_]:
        """Tell which of the tiles int64[n, 2] of zoom z it overlaps, bool[n]."""
        found = np.zeros(len(xy), dtype=bool)
        for zoom, rows, coarse in _by_zoom(z, xy, self.km):
            found[rows] = self.region.intersects(zoom, coarse)
        return found


def _by_zoom(z: int, xy: XyArray, km: float) -> Iterator[tuple[int, NDArray[np.intp], XyArray]]:
    """Yield the coarse tiles around tiles int64[n, 2] of zoom z by their zooms, and whose they are."""
    top = min(z, deepest_zoom(km))  # deeper ones are all too small
    xy = xy >> (z - top)
    ys, places = np.unique(xy[:, 1], return_inverse=True)
    zooms = np.array([coarse_tile(Tile(top, 0, y), km).z for y in ys.tolist()], dtype=np.int64)[places]
    for zoom in np.unique(zooms).tolist():
        rows = np.flatnonzero(zooms == zoom)
        yield zoom, rows, xy[rows] >> (top - zoom)


def coarse_level(level: Level, km: float) -> Level:
    """Return a level whose beam has coarse tiles, each with the score of the best tile in it."""
    return replace(level, beam=_coarse(level.beam, km), ancestors=_coarse(level.ancestors, km))


def coarse_location(location: Location, km: float) -> Location:
    """Return a result that tells no place more precisely than `km` km; candidates in one tile become one.

    Radii become larger by as much as the answer may have moved, and then whole multiples of that: the exact
    ones would tell the sizes and distances of the tiles that they were measured in.
    """
    merged: dict[Tile, Candidate] = {}
    for candidate in location.candidates:
        tile = coarse_tile(candidate.tile, km)
        first = merged.get(tile)
        if first is None:
            path = _coarse(candidate.path, km)
            merged[tile] = replace(candidate, rank=len(merged) + 1, tile=tile, point=center(tile), path=path)
        else:
            merged[tile] = replace(first, share=first.share + candidate.share)
    candidates = tuple(merged.values())
    least = half_diagonal_km(candidates[0].tile)
    moved = 0 if candidates[0].point == location.point else 1

    def coarse_radius(radius: float) -> float:
        return least * max(1, math.ceil(radius / least - 1e-9) + moved)

    return replace(
        location,
        point=candidates[0].point,
        radius_km=coarse_radius(location.radius_km),
        radii_km=tuple(map(coarse_radius, location.radii_km)),
        candidates=candidates,
        levels=tuple(coarse_level(level, km) for level in location.levels),
        exif=None,
    )


def _coarse(tiles: Iterable[ScoredTile], km: float) -> tuple[ScoredTile, ...]:
    best: dict[Tile, ScoredTile] = {}
    for scored in tiles:
        tile = coarse_tile(scored.tile, km)
        best.setdefault(tile, ScoredTile(tile=tile, score=scored.score))
    return tuple(best.values())
