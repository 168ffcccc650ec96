"""What people are told of a tile source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from geoengine.engine.sources import TileSource, open_source
from geoengine.engine.sources.description import CachePolicy, FilePart, SourceDescription
from geoengine.engine.sources.http import identity_of, template_of
from geoengine.engine.sources.keeping import cache_file
from geoengine.engine.sources.opening import open_file, parts_of
from geoengine.engine.sources.upkeep import Contents, contents


def summary(spec: str) -> Iterator[tuple[str, str]]:
    """Yield (label, value) of a tile source, part by part; asks no server.

    Raises SourceError when `spec` is no source or cannot be opened.
    """
    if spec == "planet":
        with closing(open_source(spec)) as source:
            yield from _of_source(source)
        return
    for part in parts_of(spec):
        if isinstance(part, SourceDescription):
            yield from _of_server(part)
            continue
        if part.path.suffix.lower() == ".mbtiles" and part.path.is_file():
            found = contents(part.path)
            if not found.tiles_per_zoom:  # a cache that knows of missing tiles only
                yield from _of_contents(found)
                continue
            yield from _of_file(part)
            yield from _of_contents(found)
            continue
        yield from _of_file(part)


def _of_file(part: FilePart) -> Iterator[tuple[str, str]]:
    with closing(open_file(part)) as source:
        yield from _of_source(source)


def _of_source(source: TileSource) -> Iterator[tuple[str, str]]:
    yield "name", source.name
    yield "zooms", f"{source.min_zoom} to {source.max_zoom}"
    yield "tile size", f"{source.tile_size} pixels"
    yield "bounds", ", ".join(f"{degrees:.4f}" for degrees in source.bounds)
    if source.attribution:
        yield "attribution", source.attribution
    yield "identity", source.identity


def _of_contents(found: Contents) -> Iterator[tuple[str, str]]:
    yield "file", f"{found.path}, {found.bytes / 1e6:.1f} MB"
    per_zoom = ", ".join(f"zoom {zoom}: {count}" for zoom, count in found.tiles_per_zoom.items())
    yield "tiles", f"{sum(found.tiles_per_zoom.values())} ({per_zoom})" if per_zoom else "0"
    if found.missing:
        yield "known missing", str(found.missing)
    for name in ("geoengine:terms", "format"):
        if name in found.metadata:
            yield name.removeprefix("geoengine:"), found.metadata[name]


def _of_server(description: SourceDescription) -> Iterator[tuple[str, str]]:
    template = template_of(description)
    yield "name", description.name or template.host
    yield "template", template.shown
    yield "zooms", f"{description.min_zoom} to {description.max_zoom}"
    for label, text in (("attribution", description.attribution), ("terms", description.terms)):
        yield label, text or "not known: find out before you use it"
    yield "bulk fetching", "allowed" if description.prefetch else "not allowed, as far as is known"
    if template.is_archive:  # whose identity, and with it the cache, is known when it is open
        return
    identity = identity_of(description, template)
    yield "identity", identity
    path = cache_file(description.name or template.host, identity)
    if description.cache is CachePolicy.NONE or path is None:
        yield "cache", "none"
    elif path.is_file():
        yield from _of_contents(contents(path))
    else:
        yield "cache", f"{_shown(path)}, not there yet"


def _shown(path: Path) -> str:
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
