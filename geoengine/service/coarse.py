"""Answers no more precise than they may be: tiles, places and radii of at least some size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from geoengine.engine.results import Candidate, Level, Location, ScoredTile
from geoengine.engine.tiles import MAX_ZOOM, LngLat, Tile, center, half_diagonal_km, parent, tile_at


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


def coarse_point(point: LngLat, km: float) -> LngLat:
    """Return the centre of the smallest such tile around a point."""
    return center(coarse_tile(tile_at(point, MAX_ZOOM), km))


def coarse_level(level: Level, km: float) -> Level:
    """Return a level whose beam has coarse tiles, each with the score of the best tile in it."""
    return replace(level, beam=_coarse(level.beam, km), ancestors=_coarse(level.ancestors, km))


def coarse_location(location: Location, km: float) -> Location:
    """Return a result that tells no place more precisely than `km` km; candidates in one tile become one."""
    merged: dict[Tile, Candidate] = {}
    for candidate in location.candidates:
        tile = coarse_tile(candidate.tile, km)
        first = merged.get(tile)
        if first is None:
            path = _coarse(candidate.path, km)
            merged[tile] = replace(candidate, rank=len(merged) + 1, tile=tile, point=center(tile), path=path)
        else:
            merged[tile] = replace(first, share=first.share + candidate.share)
    least = half_diagonal_km(next(iter(merged)))
    return replace(
        location,
        point=coarse_point(location.point, km),
        radius_km=max(location.radius_km, least),
        radii_km=tuple(max(radius, least) for radius in location.radii_km),
        candidates=tuple(merged.values()),
        levels=tuple(coarse_level(level, km) for level in location.levels),
        exif=None,
    )


def _coarse(tiles: Iterable[ScoredTile], km: float) -> tuple[ScoredTile, ...]:
    best: dict[Tile, ScoredTile] = {}
    for scored in tiles:
        tile = coarse_tile(scored.tile, km)
        best.setdefault(tile, ScoredTile(tile=tile, score=scored.score))
    return tuple(best.values())
