"""Open tile sources from what describes them: files, templates, TOML files, presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import WORLD_BOUNDS, TileSource
from geoengine.engine.sources.cache import TileCache
from geoengine.engine.sources.combined import CombinedSource, Limited
from geoengine.engine.sources.description import (
    Adapter,
    CachePolicy,
    FilePart,
    Part,
    SourceDescription,
    presets,
    read_description,
    read_preset,
)
from geoengine.engine.sources.http import HttpSource, identity_of, template_of
from geoengine.engine.sources.keeping import cache_file, cache_limit_bytes
from geoengine.engine.sources.mbtiles import IDENTITY_KEY
from geoengine.engine.sources.template import UrlTemplate


def parts_of(spec: str) -> tuple[Part, ...]:
    """Return what a preset's name, a URL template, a TOML file, or a file or folder of tiles stands for.

    Raises SourceError when it is none of these.
    """
    if spec.lower().startswith(("http://", "https://")):
        return (SourceDescription(template=spec),)
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".toml":
        return read_description(path)
    if spec in presets() and not path.exists():
        return read_preset(spec)
    return (FilePart(path=path),)


def open_parts(parts: Iterable[Part]) -> TileSource:
    """Open the parts of a source as one."""
    with ExitStack() as undo:
        opened: list[TileSource] = []
        for part in parts:
            source = open_file(part) if isinstance(part, FilePart) else open_server(part)
            undo.callback(source.close)
            opened.append(source)
        undo.pop_all()
    return opened[0] if len(opened) == 1 else CombinedSource(opened)


def open_file(part: FilePart) -> TileSource:
    """Open a file or folder of tiles for the zooms that are wanted of it."""
    source = _open_path(part.path)
    if part.min_zoom <= source.min_zoom and source.max_zoom <= part.max_zoom:
        return source
    return Limited(source, part.min_zoom, part.max_zoom)


def open_server(description: SourceDescription, *, pack: Path | None = None) -> TileSource:
    """Open a tile server with its cache; with `pack`, its tiles are kept in that file instead.

    Raises SourceError, among other things for a server whose terms nobody has accepted.
    """
    if description.adapter is Adapter.GOOGLE:
        from geoengine.engine.sources.google import open_google

        return open_google(description)
    template = template_of(description)
    if template.is_archive:
        from geoengine.engine.sources.ranges import open_remote_pmtiles

        return open_remote_pmtiles(
            description, template, lambda identity: _cache_of(description, template, identity)
        )
    identity = identity_of(description, template)
    if pack is None:
        cache = _cache_of(description, template, identity)
    else:
        description = dataclasses.replace(description, cache=CachePolicy.FOREVER)
        cache = cache_at(pack, description, template, identity, limit_bytes=0)
    return HttpSource(description, cache, template=template)


def cache_at(
    path: Path, description: SourceDescription, template: UrlTemplate, identity: str, *, limit_bytes: int
) -> TileCache:
    """Return the cache of a server's tiles in a file; its metadata holds no key."""
    metadata = {
        "name": description.name or template.host,
        "description": template.shown,
        "attribution": description.attribution,
        IDENTITY_KEY: identity,
    }
    if description.terms:
        metadata["geoengine:terms"] = description.terms
    if description.bounds != WORLD_BOUNDS:
        metadata["bounds"] = ",".join(f"{degrees:.6f}" for degrees in description.bounds)
    return TileCache(path, metadata, limit_bytes=limit_bytes)


def _cache_of(description: SourceDescription, template: UrlTemplate, identity: str) -> TileCache | None:
    if description.cache is CachePolicy.NONE:
        return None
    path = cache_file(description.name or template.host, identity)
    if path is None:
        return None
    return cache_at(path, description, template, identity, limit_bytes=cache_limit_bytes())


def _open_path(path: Path) -> TileSource:
    if path.suffix.lower() == ".mbtiles":
        from geoengine.engine.sources.mbtiles import MBTilesSource

        return MBTilesSource(path)
    if path.suffix.lower() == ".pmtiles":
        from geoengine.engine.sources.pmtiles import MappedFile, PMTilesSource

        return PMTilesSource(MappedFile(path))
    if path.is_dir():
        from geoengine.engine.sources.folder import FolderSource

        return FolderSource(path)
    what = f"{path} is not a tile source" if path.exists() else f"there is no tile source {str(path)!r}"
    raise SourceError(
        f"{what}: a tile source is a URL template such as https://host/{{z}}/{{x}}/{{y}}.png, an .mbtiles or "
        ".pmtiles file, a folder of z/x/y.png tiles, a .toml file that describes sources, one of the presets "
        f"{', '.join(presets())}, or the word planet"
    )
