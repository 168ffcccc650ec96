"""What a tile server is like: one dataclass, and TOML files that hold one or several of them."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import WORLD_BOUNDS
from geoengine.engine.tiles import MAX_ZOOM, LngLatBbox

_FOLDER = ("data", "sources")  # of the presets, in the package engine


class CachePolicy(StrEnum):
    """How long a server's tiles may be kept on disk."""

    NONE = "none"
    HEADER = "header"
    FOREVER = "forever"


class Adapter(StrEnum):
    """Servers that need more than a template."""

    TEMPLATE = "template"
    GOOGLE = "google"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceDescription:
    """A tile server: where its tiles are, whom to credit, what its terms allow, and how it is asked.

    `template` and the values of `headers` have placeholders, as `UrlTemplate` says. `rate_per_s` bounds the
    requests to the server's host, 0 means no bound. `tile_size` 0 means that of the first tile.
    `placeholders` are SHA-256 hashes of pictures that mean "no imagery here". `missing_age_days` is how long
    the cache believes that a tile does not exist. `prefetch` says that the terms allow to fetch regions in
    bulk. `accept_terms` is the user's word for servers whose terms forbid analysis. Raises SourceError for
    values that cannot be.
    """

    template: str
    name: str = ""
    attribution: str = ""
    terms: str = ""
    adapter: Adapter = Adapter.TEMPLATE
    accept_terms: bool = False
    subdomains: tuple[str, ...] = ("a", "b", "c")
    headers: Mapping[str, str] = field(default_factory=dict)
    min_zoom: int = 0
    max_zoom: int = MAX_ZOOM
    bounds: LngLatBbox = WORLD_BOUNDS
    tile_size: int = 0
    placeholders: tuple[str, ...] = ()
    cache: CachePolicy = CachePolicy.HEADER
    missing_age_days: float = 7.0
    prefetch: bool = False
    rate_per_s: float = 0.0
    concurrency: int = 16
    attempts: int = 8
    backoff_s: float = 0.5  # before the second attempt; doubled before each further one
    longest_wait_s: float = 60.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_zoom <= self.max_zoom <= MAX_ZOOM:
            raise SourceError(f"zooms {self.min_zoom} to {self.max_zoom} are not a range in [0, {MAX_ZOOM}]")
        if min(self.concurrency, self.attempts) < 1:
            raise SourceError("concurrency and attempts must be at least 1")
        waits = (self.backoff_s, self.longest_wait_s, self.connect_timeout_s, self.read_timeout_s)
        if min(*waits, self.missing_age_days, self.rate_per_s, self.tile_size) < 0:
            raise SourceError("times, rates and sizes must not be negative")
        if not self.subdomains:
            raise SourceError("subdomains must name at least one")

    def __repr__(self) -> str:
        """Show no template and no header: there may be a key in them."""
        return f"SourceDescription(name={self.name!r}, zooms {self.min_zoom}-{self.max_zoom})"


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePart:
    """A file or folder of tiles in a TOML file of sources, and the zooms that it is taken for."""

    path: Path
    min_zoom: int = 0
    max_zoom: int = MAX_ZOOM


Part = SourceDescription | FilePart


def presets() -> list[str]:
    """Return the names of the sources that the package describes."""
    folder = resources.files("geoengine.engine").joinpath(*_FOLDER)
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def read_preset(name: str) -> tuple[Part, ...]:
    """Return the parts of a preset; raises SourceError for a name that is none."""
    if name not in presets():
        raise SourceError(f"there is no preset {name!r} of tile sources; there are {', '.join(presets())}")
    text = resources.files("geoengine.engine").joinpath(*_FOLDER, f"{name}.toml").read_text("utf-8")
    return parse_parts(text, name, Path())


def read_description(path: Path) -> tuple[Part, ...]:
    """Return the parts of a TOML file of tile sources, coarse zooms first.

    The file has a table `[[source]]` for each part, with the fields of `SourceDescription`; with `preset`,
    the name of a preset, whose fields the others replace; or with `file`, a path from the TOML file's folder,
    and perhaps `min_zoom` and `max_zoom`. Raises SourceError for a file that cannot be read or says something
    else, and for parts whose zooms overlap.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: the file cannot be read ({error})") from error
    return parse_parts(text, path.name, path.parent)


def parse_parts(text: str, name: str, folder: Path) -> tuple[Part, ...]:
    """Return the parts that a TOML text describes; see `read_description`."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SourceError(f"{name}: this is not valid TOML ({error})") from error
    entries = tables.get("source")
    if set(tables) != {"source"} or not isinstance(entries, list) or not entries:
        raise SourceError(f"{name}: expected a table [[source]] for each tile source, and nothing else")
    parts: list[Part] = []
    for number, entry in enumerate(entries, start=1):
        try:
            parts += _parts(entry, folder)
        except SourceError as error:
            raise SourceError(f"{name}: source {number}: {error}") from error
    parts.sort(key=lambda part: part.min_zoom)
    for upper, lower in itertools.pairwise(parts):
        if lower.min_zoom <= upper.max_zoom:
            raise SourceError(f"{name}: zoom {lower.min_zoom} is in two sources: set min_zoom and max_zoom")
    return tuple(parts)


def _parts(entry: dict[str, Any], folder: Path) -> list[Part]:
    kinds = [kind for kind in ("template", "preset", "file") if kind in entry]
    if len(kinds) != 1:
        raise SourceError("expected one of template, preset and file")
    rest = {key: value for key, value in entry.items() if key != kinds[0]}
    value = _text(kinds[0], entry[kinds[0]])
    if kinds == ["template"]:
        return [SourceDescription(template=value, **_fields(rest))]
    if kinds == ["preset"]:
        return _narrowed(read_preset(value), _fields(rest))
    if set(rest) - {"min_zoom", "max_zoom"}:
        raise SourceError("a file takes min_zoom and max_zoom only")
    return [FilePart(path=folder / Path(value).expanduser(), **_fields(rest))]


def _narrowed(parts: tuple[Part, ...], given: dict[str, Any]) -> list[Part]:
    """Return a preset's parts, with other fields, that lie in the zooms that are wanted."""
    first, last = given.pop("min_zoom", 0), given.pop("max_zoom", MAX_ZOOM)
    narrowed = []
    for part in parts:
        zooms = {"min_zoom": max(first, part.min_zoom), "max_zoom": min(last, part.max_zoom)}
        if zooms["min_zoom"] <= zooms["max_zoom"]:
            narrowed.append(dataclasses.replace(part, **given, **zooms))
    if not narrowed:
        raise SourceError(f"the preset has no zoom between {first} and {last}")
    return narrowed


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    known = {item.name: item for item in dataclasses.fields(SourceDescription) if item.name != "template"}
    for key in values:
        if key not in known:
            raise SourceError(f"unknown key {key!r}; there are {', '.join(known)}")
    return {key: _READERS[str(known[key].type)](key, value) for key, value in values.items()}


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise SourceError(f"{key} must be a text, got {value!r}")
    return value


def _number(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SourceError(f"{key} must be a number, got {value!r}")
    return float(value)


def _whole(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise SourceError(f"{key} must be a whole number, got {value!r}")
    return value


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SourceError(f"{key} must be true or false, got {value!r}")
    return value


def _texts(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise SourceError(f"{key} must be a list of texts, got {value!r}")
    return tuple(_text(key, item) for item in value)


def _headers(key: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise SourceError(f"{key} must be a table of texts")  # not what was got: there may be a key in it
    return value


def _bounds(key: str, value: object) -> LngLatBbox:
    if not isinstance(value, list) or len(value) != 4:
        raise SourceError(f"{key} must be [west, south, east, north] in degrees, got {value!r}")
    box = LngLatBbox(*(_number(key, degrees) for degrees in value))
    if not (box.west < box.east and box.south < box.north):
        raise SourceError(f"{key} needs west < east and south < north, got {value!r}")
    return box


def _choice(kind: type[StrEnum]) -> Any:  # noqa: ANN401 - a reader, as the others
    def read(key: str, value: object) -> StrEnum:
        if not isinstance(value, str) or value not in list(kind):
            raise SourceError(f"{key} must be one of {', '.join(kind)}, got {value!r}")
        return kind(value)

    return read


_READERS: dict[str, Any] = {
    "str": _text,
    "int": _whole,
    "float": _number,
    "bool": _flag,
    "tuple[str, ...]": _texts,
    "Mapping[str, str]": _headers,
    "LngLatBbox": _bounds,
    "CachePolicy": _choice(CachePolicy),
    "Adapter": _choice(Adapter),
}
