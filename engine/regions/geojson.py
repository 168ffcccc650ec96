"""Regions from GeoJSON files (RFC 7946)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from geoengine.engine.regions import RegionError
from geoengine.engine.regions.edges import Edges, ring_edges
from geoengine.engine.regions.polygons import Polygons

_MOST_BYTES = 256 << 20
_MEMBERS = {"FeatureCollection": "features", "GeometryCollection": "geometries"}
_DEEPEST = 8  # collections in collections


def read_geojson(path: Path) -> Polygons:
    """Return the union of all polygons in a file; see `parse_geojson`.

    Raises RegionError, naming the file, for one that cannot be read.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RegionError(f"{path}: the file has more than {_MOST_BYTES >> 20} MB: simplify its polygons")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RegionError(f"{path}: the region cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise RegionError(f"{path}: this is no JSON file") from None
    return parse_geojson(text, name=path.name, where=str(path))


def parse_geojson(text: str, *, name: str, where: str) -> Polygons:
    """Return the union of all polygons in GeoJSON; points and lines in it count for nothing.

    Edges are straight in longitude and latitude. A polygon across the antimeridian is cut there in two, as
    the RFC asks, or has longitudes beyond 180 (or -180). `name` is the region's, `where` what errors begin
    with. Raises RegionError for what is no GeoJSON, has no polygon, or has coordinates that are not degrees.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise RegionError(f"{where}: this is no JSON file") from None
    try:
        edges = [edge for polygon in _polygons(data, 0) for edge in _polygon_edges(polygon)]
    except ValueError as error:
        raise RegionError(f"{where}: this is no sound GeoJSON file: {error}") from None
    if not edges:
        raise RegionError(f"{where}: the file has no polygon, and a region needs one")
    return Polygons(name, np.concatenate(edges), of_earth=False)


def _polygons(data: object, depth: int) -> Iterator[list[Any]]:
    """Yield the coordinates of all polygons; ValueError says what is wrong."""
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise ValueError('an object with a "type" is needed')
    if depth > _DEEPEST:
        raise ValueError("its collections lie too deep in each other")
    kind = data["type"]
    if kind in _MEMBERS:
        for member in _array(data.get(_MEMBERS[kind]), _MEMBERS[kind]):
            yield from _polygons(member, depth + 1)
    elif kind == "Feature":
        if data.get("geometry") is not None:
            yield from _polygons(data["geometry"], depth + 1)
    elif kind == "Polygon":
        yield _array(data.get("coordinates"), "coordinates")
    elif kind == "MultiPolygon":
        yield from (
            _array(polygon, "a polygon") for polygon in _array(data.get("coordinates"), "coordinates")
        )


def _polygon_edges(rings: list[Any]) -> Iterator[Edges]:
    for index, ring in enumerate(rings):
        try:
            points = np.array([position[:2] for position in ring], dtype=np.float64)
        except (TypeError, ValueError, LookupError):  # a position may be a number, a text or an object
            raise ValueError("a ring must be a list of positions [longitude, latitude]") from None
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError("a ring must be a list of positions [longitude, latitude]")
        if not (np.isfinite(points).all() and (np.abs(points) <= [540.0, 90.0]).all()):
            raise ValueError("positions must be degrees, longitude first; latitudes are from -90 to 90")
        if (points[0] != points[-1]).any():
            points = np.concatenate([points, points[:1]])
        if len(points) < 4:
            raise ValueError("a ring needs at least three corners")
        yield ring_edges(points, hole=index > 0)


def _array(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f'"{name}" must be an array')
    return value
