"""Results as JSON: one object per photo, one photo per line (JSON Lines).

The JSON Schema in `geoengine/engine/data/result.schema.json` describes the format; `schema_text` returns it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib import resources
from typing import Any

from geoengine.engine.results import HYPOTHESIS, Candidate, Level, Location, ScoredTile

SCHEMA = 2
"""Version of the format; it grows when a reader of the old one would misread the new one."""

DEGREE_DIGITS = 7
"""Decimals of a degree that are written: about a centimetre."""


def schema_text() -> str:
    """Return the JSON Schema (draft 2020-12) that every object of `json_object` obeys."""
    return resources.files("geoengine.engine").joinpath("data", "result.schema.json").read_text("utf-8")


def json_lines(locations: Iterable[Location]) -> str:
    """Return one line of JSON per photo, each ending in a line feed.

    All of it is ASCII, so that no file name and no terminal encoding can spoil it. Raises ValueError for a
    NaN or an infinity.
    """
    return "".join(json.dumps(json_object(location), allow_nan=False) + "\n" for location in locations)


def json_object(location: Location) -> dict[str, Any]:
    """Return a result as plain dicts, lists, strings and numbers.

    Degrees are rounded to 7 decimals, scores and shares to 6, kilometres and seconds to 3.
    """
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "photo": location.photo,
        "world": location.world,
        "latitude": round(location.point.lat, DEGREE_DIGITS),
        "longitude": round(location.point.lng, DEGREE_DIGITS),
        "score": round(location.score, 6),
        "radius_km": round(location.radius_km, 3),
        "radius_share": round(location.radius_share, 6),
        "radius_calibrated": location.radius_calibrated,
        "candidates": [_candidate(candidate) for candidate in location.candidates],
        "levels": [level_object(level) for level in location.levels],
        "k": location.k,
        "scoring": asdict(location.scoring),
        "within": location.within,
        "tiles": location.tiles,
        "levels_left_out": list(location.left_out),
        "attribution": location.attribution,
        "model": location.model,
        "seconds": round(location.seconds, 3),
        "note": HYPOTHESIS,
    }
    return record | exif_member(location)


def exif_member(location: Location) -> dict[str, Any]:
    """Return the member "exif", the distance to the photo's own tag, of results compared with it."""
    if location.exif is None:
        return {}
    km = location.exif.distance_km
    distance = None if km is None else round(km, 3)
    return {"exif": {"distance_km": distance, "meaningful": km is not None and location.world == "earth"}}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "rank": candidate.rank,
        "z": candidate.tile.z,
        "x": candidate.tile.x,
        "y": candidate.tile.y,
        "latitude": round(candidate.point.lat, DEGREE_DIGITS),
        "longitude": round(candidate.point.lng, DEGREE_DIGITS),
        "score": round(candidate.score, 6),
        "share": round(candidate.share, 6),
        "path": [_scored_tile(step) for step in candidate.path],
    }


def level_object(level: Level) -> dict[str, Any]:
    """Return one level as plain dicts, lists, strings and numbers: an element of "levels"."""
    return {
        "zoom": level.zoom,
        "candidates": level.candidates,
        "missing": level.missing,
        "late": level.late,
        "coverage": round(level.coverage, 6),
        "known": level.known,
        "enlarged": level.enlarged,
        "exhaustive": level.exhaustive,
        "beam": [_scored_tile(scored) for scored in level.beam],
    }


def _scored_tile(scored: ScoredTile) -> dict[str, Any]:
    tile = scored.tile
    return {"z": tile.z, "x": tile.x, "y": tile.y, "score": round(scored.score, 6)}
