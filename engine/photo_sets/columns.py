"""The columns of photo tables, whatever their authors call them, and the coordinates in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geoengine.engine.photo_sets import PhotoSetError
from geoengine.engine.tiles import LngLat

_KEY = ("key", "__key__", "id", "img_id", "image_id", "photo_id", "photoid", "imageid")
_LAT = ("lat", "latitude", "lat_deg", "gps_lat")
_LNG = ("lng", "lon", "long", "longitude", "lng_deg", "gps_lon", "gps_lng")
_AUTHOR = (
    "author",
    "uploader",
    "uploader_id",
    "user",
    "user_id",
    "userid",
    "owner",
    "photographer",
)
_FILE = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "image",
    "img",
    "photo",
)
_URL = ("url", "image_url", "photo_url", "img_url", "download_url")
_DATA = ("jpg", "jpeg", "png", "webp", "bytes", "image_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The columns of a table, by what they mean; None for those that it lacks."""

    key: str | None
    lat: str | None
    lng: str | None
    author: str | None
    file: str | None
    url: str | None
    data: str | None

    @property
    def used(self) -> list[str]:
        """Return the columns that are read, each once."""
        all_columns = (self.key, self.lat, self.lng, self.author, self.file, self.url, self.data)
        return list(dict.fromkeys(column for column in all_columns if column is not None))


def find_columns(names: Sequence[str], table: str, *, need_place: bool) -> Columns:
    """Find the columns among a table's names, in upper or lower case.

    Raises PhotoSetError when a photo, or with `need_place` a coordinate, has no column.
    """
    by_name = {name.strip().lower(): name for name in reversed(names)}

    def first(aliases: tuple[str, ...]) -> str | None:
        return next((by_name[alias] for alias in aliases if alias in by_name), None)

    columns = Columns(
        key=first(_KEY),
        lat=first(_LAT),
        lng=first(_LNG),
        author=first(_AUTHOR),
        file=first(_FILE),
        url=first(_URL),
        data=first(_DATA),
    )
    missing = []
    if not (columns.key or columns.file or columns.url or columns.data):
        missing.append("the photo (key, id, IMG_ID, path, file, image or url)")
    if need_place and columns.lat is None:
        missing.append("the latitude (lat, LAT or latitude)")
    if need_place and columns.lng is None:
        missing.append("the longitude (lon, lng, LON or longitude)")
    if missing:
        raise PhotoSetError(
            f"{table}: it has no column for {' and none for '.join(missing)}; "
            f"its columns are {', '.join(name.strip() or '(no name)' for name in names)}"
        )
    return columns


def read_place(lat: Any, lng: Any, where: str, *, need_place: bool) -> LngLat | None:  # noqa: ANN401 - any cell
    """Return the place of two cells, in degrees.

    What cannot be a place gives None, or with `need_place` a PhotoSetError that begins with `where`.
    """
    try:
        return LngLat(_degrees(lng, "longitude", 180.0), _degrees(lat, "latitude", 90.0))
    except ValueError as error:
        if not need_place:
            return None
        swapped = _is_within(lng, 90.0) and _is_within(lat, 180.0) and not _is_within(lat, 90.0)
        hint = "; are latitude and longitude swapped?" if swapped else ""
        raise PhotoSetError(f"{where}: {error}{hint}") from None


def place_of(values: Mapping[str, Any], where: str, *, need_place: bool) -> LngLat | None:
    """Return the place in a sample's metadata, whose fields are named as columns are."""
    by_name = {str(name).lower(): value for name, value in values.items()}
    lat, lng = (next((by_name[a] for a in aliases if a in by_name), None) for aliases in (_LAT, _LNG))
    return read_place(lat, lng, where, need_place=need_place)


def text_of(values: Mapping[str, Any], column: str) -> str:
    """Return the text under "author" or "url" in a sample's metadata; fields are named as columns are."""
    by_name = {str(name).lower(): value for name, value in values.items()}
    aliases = _AUTHOR if column == "author" else _URL
    value = next((by_name[alias] for alias in aliases if alias in by_name), None)
    return "" if value is None else str(value)


def _degrees(value: Any, what: str, limit: float) -> float:  # noqa: ANN401 - any cell
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"there is no {what}")
    try:
        degrees = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"the {what} {value!r} is not a number of degrees") from None
    if not math.isfinite(degrees) or abs(degrees) > limit:
        raise ValueError(f"the {what} {degrees:g} is not from {-limit:g} to {limit:g}")
    return degrees


def _is_within(value: Any, limit: float) -> bool:  # noqa: ANN401 - any cell
    try:
        return abs(float(value)) <= limit
    except (TypeError, ValueError):
        return False
