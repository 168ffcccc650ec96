"""Results as GeoJSON (RFC 7946): candidates as points, the beam of every level as polygons."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from geoengine.engine.render.json_lines import DEGREE_DIGITS, exif_member
from geoengine.engine.results import HYPOTHESIS, Candidate, Level, Location
from geoengine.engine.tiles import LngLat, Tile, bounds

Feature = dict[str, Any]


def geojson_text(locations: Iterable[Location]) -> str:
    """Return one FeatureCollection with the features of all photos, as text that ends in a line feed."""
    return json.dumps(feature_collection(locations), allow_nan=False) + "\n"


def feature_collection(locations: Iterable[Location]) -> dict[str, Any]:
    """Return a GeoJSON FeatureCollection: per photo its candidates, best first, then its beams.

    Positions are [longitude, latitude] in degrees. Every feature has the properties "photo", "world" and
    "kind", which is "candidate" (Point: the centre of its tile, or a point of the gallery for method geoclip)
    or "beam" (Polygon: the tile). The first candidate carries "radius_km" too. Rings run counter-clockwise.
    No polygon crosses the antimeridian, since no tile does: one that ends there has its east edge at 180, one
    that begins there its west edge at -180. "note" is a foreign member.
    """
    features = [feature for location in locations for feature in _features(location)]
    return {"type": "FeatureCollection", "note": HYPOTHESIS, "features": features}


def _features(location: Location) -> Iterator[Feature]:
    for candidate in location.candidates:
        yield _candidate_feature(location, candidate)
    for level in location.levels:
        yield from _beam_features(location, level)


def _candidate_feature(location: Location, candidate: Candidate) -> Feature:
    properties = _properties(location, "candidate") | {
        "rank": candidate.rank,
        "score": round(candidate.score, 6),
        "share": round(candidate.share, 6),
        "tile": str(candidate.tile),
        "within": location.within,
        "tiles": location.tiles,
        "attribution": location.attribution,
        "model": location.model,
    }
    if candidate.rank == 1:
        properties["radius_km"] = round(location.radius_km, 3)
        properties |= exif_member(location)
    geometry = {"type": "Point", "coordinates": _position(candidate.point)}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _beam_features(location: Location, level: Level) -> Iterator[Feature]:
    for rank, scored in enumerate(level.beam, start=1):
        properties = _properties(location, "beam") | {
            "zoom": level.zoom,
            "rank": rank,
            "score": round(scored.score, 6),
            "tile": str(scored.tile),
        }
        geometry = {"type": "Polygon", "coordinates": [_ring(scored.tile)]}
        yield {"type": "Feature", "geometry": geometry, "properties": properties}


def _properties(location: Location, kind: str) -> dict[str, Any]:
    return {"photo": location.photo, "world": location.world, "kind": kind}


def _ring(tile: Tile) -> list[list[float]]:
    west, south, east, north = bounds(tile)
    corners = [(west, south), (east, south), (east, north), (west, north), (west, south)]
    return [_position(LngLat(lng, lat)) for lng, lat in corners]


def _position(point: LngLat) -> list[float]:
    return [round(point.lng, DEGREE_DIGITS), round(point.lat, DEGREE_DIGITS)]
