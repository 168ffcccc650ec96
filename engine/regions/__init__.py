"""Parts of the world that a search or an index is restricted to: boxes, polygons, countries, land."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import GeoEngineError
from geoengine.engine.tiles import LngLatBbox, XyArray

_WHAT_A_REGION_IS = (
    "a region is a box west,south,east,north in degrees, a GeoJSON file with polygons, "
    "or a country's ISO 3166 code such as FR or FRA"
)


_LONGEST_BOX = 200  # characters that are repeated in an error


class RegionError(GeoEngineError):
    """A region cannot be understood, or has no tiles."""


class Region(Protocol):
    """A part of the world."""

    @property
    def name(self) -> str:
        """What people are told of it."""
        ...

    @property
    def of_earth(self) -> bool:
        """Whether it means a place on Earth, as a country does, and not just coordinates."""
        ...

    def tiles(self, z: int) -> XyArray:
        """Return the tiles of zoom z that the region overlaps, int64[n, 2], sorted by x, then y.

        Raises TileError when there are more than one array may hold.
        """
        ...

    def intersects(self, z: int, xy: XyArray) -> npt.NDArray[np.bool_]:
        """Tell which of the tiles int64[n, 2] of zoom z the region overlaps, bool[n]."""
        ...


def parse_region(text: str) -> Region:
    """Return the region that a command line names: a box, a GeoJSON file or a country.

    Raises RegionError when it is none of these.
    """
    if text.count(",") == 3:
        return _parse_box(text)
    path = Path(text).expanduser()
    if path.suffix.lower() in (".geojson", ".json") or path.is_file():
        from geoengine.engine.regions.geojson import read_geojson

        return read_geojson(path)
    if text.isalpha() and len(text) in (2, 3):
        from geoengine.engine.regions.countries import country

        return country(text)
    raise RegionError(f"{text!r} is no region: {_WHAT_A_REGION_IS}")


def parse_given_region(text: str) -> Region:
    """Return the region that somebody else than the user of this machine names, who may name no file.

    That is a box, a country, or GeoJSON itself. Raises RegionError.
    """
    if text.lstrip().startswith("{"):
        from geoengine.engine.regions.geojson import parse_geojson

        return parse_geojson(text, name="a GeoJSON region", where="within")
    if text.count(",") == 3 and len(text) <= _LONGEST_BOX:
        return _parse_box(text)
    if text.isascii() and text.isalpha() and len(text) in (2, 3):
        from geoengine.engine.regions.countries import country

        return country(text)
    raise RegionError(
        "within is no region: give a box west,south,east,north in degrees, a country's ISO 3166 code such as "
        "FR or FRA, or GeoJSON with polygons"
    )


def _parse_box(text: str) -> Region:
    from geoengine.engine.regions.box import Box

    try:
        west, south, east, north = map(float, text.split(","))
    except ValueError:
        raise RegionError(f"{text!r} is no box: {_WHAT_A_REGION_IS}") from None
    if not all(map(math.isfinite, (west, south, east, north))):
        raise RegionError(f"the box {text} needs finite numbers of degrees")
    if not (-90 <= south < north <= 90):
        raise RegionError(f"the box {text} needs -90 <= south < north <= 90: write west,south,east,north")
    if not (-180 <= west <= 180 and -180 <= east <= 180) or west == east:
        raise RegionError(
            f"the box {text} needs different longitudes from -180 to 180; "
            "west > east crosses the antimeridian"
        )
    return Box(LngLatBbox(west, south, east, north))
