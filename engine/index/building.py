"""Building tile indexes: resumable, one process at a time, complete or recognisably not."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import Backend
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.index.errors import TileIndexError
from geoengine.engine.index.segments import (
    Ids,
    Segment,
    find,
    merge_segments,
    tile_ids,
    tiles_of_ids,
    write_segment,
)
from geoengine.engine.index.tile_index import (
    MANIFEST,
    PARTS,
    Area,
    Description,
    Maker,
    TileIndex,
    index_files,
    level_file,
)
from geoengine.engine.manifest import encoder_name
from geoengine.engine.pictures import hand_on
from geoengine.engine.regions import Region
from geoengine.engine.regions.box import Overlap, searched_area
from geoengine.engine.render.files import locked
from geoengine.engine.sources import TileSource, fingerprint
from geoengine.engine.tiles import all_xy

TILES_PER_PART = 4096
"""Tiles between two moments at which an interrupted build goes on."""

_ABANDONED_S = 600.0  # a part is written in less than a second

Embed: TypeAlias = Callable[[int, Sequence[Ids], Callable[[int], None]], None]
"""Embeds the tiles of a zoom, in parts, into files of the index; tells how many are done, often."""

BuildProgress: TypeAlias = Callable[[int, int, int], None]
"""(zoom, tiles done, tiles in all), often."""


def build_index(
    folder: Path,
    bundle: EngineBundle,
    source: TileSource,
    backend: Backend,
    *,
    zooms: Sequence[int],
    area: Region | None = None,
    land: bool = False,
    progress: BuildProgress = lambda zoom, done, total: None,
    elsewhere: Embed | None = None,
) -> TileIndex:
    """Embed all tiles of some zooms that lie in an area, or only those of them on land, into a folder.

    `elsewhere` embeds parts on other machines, in place of the source and the backend at hand.

    Nothing is asked for outside the source's bounds. A folder that holds a part of the same index is
    completed, one that holds other levels of it gets more. Tiles that the source lacks are noted and not
    asked for again. Raises TileIndexError for a folder that holds another index, that another process builds,
    or for tiles that may not be kept; what the source and the backend raise passes through, and the parts
    that are done stay.
    """
    check_zooms(bundle, source, zooms)
    region = searched_area(source, area)
    wanted = Description(
        maker=Maker.of(bundle, source, backend),
        areas=(Area(land=land, within="" if area is None or region is None else region.name),),
    )
    with building(folder):
        description = _begun(folder, wanted)
        for zoom in zooms:
            if zoom not in description.complete:
                ids = np.sort(tile_ids(_tiles(zoom, region, land)))
                embed = elsewhere or Embedder(folder, source, backend, wanted.maker.width).embed
                _build_level(folder, embed, zoom, ids, wanted.maker.width, progress)
                description = description.with_level(zoom)
                description.write(folder)
            _drop_parts(folder, zoom)
    return TileIndex(folder)


def check_zooms(bundle: EngineBundle, source: TileSource, zooms: Sequence[int]) -> None:
    """Raise TileIndexError for zooms that cannot be indexed, or for tiles that may not be kept."""
    if not source.storable:
        raise TileIndexError(f"the terms of {source.name} forbid to keep what is computed from its tiles")
    for zoom in zooms:
        if zoom not in bundle.levels:
            known = ", ".join(map(str, bundle.levels))
            raise TileIndexError(f"no map encoder for zoom {zoom}: the engine bundle has levels {known}")
        if not source.min_zoom <= zoom <= source.max_zoom:
            raise TileIndexError(
                f"{source.name} has no tiles of zoom {zoom}, only {source.min_zoom} to {source.max_zoom}"
            )


def merge_indexes(folder: Path, parts: Sequence[Path]) -> TileIndex:
    """Write one index with the tiles of several, which must be of the same encoder and the same tiles.

    A level is complete when it is so in all of them, or in one of them where all are of the same area.
    Raises TileIndexError when they do not fit together, or when `folder` exists.
    """
    indexes = [TileIndex(part) for part in parts]
    first = indexes[0].description
    for index in indexes[1:]:
        maker = index.description.maker
        if (maker.encoder, maker.source) != (first.maker.encoder, first.maker.source):
            other = "encoder" if maker.encoder != first.maker.encoder else "tile source"
            raise TileIndexError(f"{index.path} and {indexes[0].path} are of another {other} each")
    if folder.exists() and any(folder.iterdir()):
        raise TileIndexError(f"{folder}: the folder is not empty: give the merged index a new one")
    areas = tuple(dict.fromkeys(area for index in indexes for area in index.description.areas))
    levels = [set(index.description.complete) for index in indexes]
    same = all(index.description.areas == first.areas for index in indexes)
    complete = set.union(*levels) if same else set.intersection(*levels)
    with building(folder):
        for zoom in sorted(set.union(*(set(index.segments) for index in indexes))):
            segments = [segment for index in indexes for segment in index.segments.get(zoom, ())]
            target = level_file(folder, zoom) if zoom in complete else new_part(folder, zoom)
            merge_segments(target, segments)
        replace(first, areas=areas, complete=tuple(sorted(complete))).write(folder)
    return TileIndex(folder)


@contextlib.contextmanager
def building(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock; raises TileIndexError when another process does, or it cannot be."""
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TileIndexError(f"{folder}: cannot be written ({error.strerror or error})") from None
    busy = f"{folder}: another process builds this index; wait for it, or give another folder"
    with locked(folder / "lock", busy, TileIndexError):
        _sweep(folder)
        yield


def _sweep(folder: Path) -> None:
    """Delete what killed processes have left half written; a young file may be another process's."""
    for file in (*folder.glob(".*.tmp"), *(folder / PARTS).glob(".*.tmp")):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _ABANDONED_S:
                file.unlink()


def new_part(folder: Path, zoom: int) -> Path:
    """Return a name for one more part of a level."""
    return folder / PARTS / f"z{zoom:02d}-{secrets.token_hex(8)}.rows"


def _begun(folder: Path, wanted: Description) -> Description:
    """Return the description of the index that lies in a folder, or begin it."""
    if not (folder / MANIFEST).exists():
        if list(index_files(folder)):
            raise TileIndexError(
                f"{folder}: the folder has rows of an index without its {MANIFEST}: delete it"
            )
        wanted.write(folder)
        return wanted
    there = Description.read(folder)
    for name in ("encoder", "source", "variant", "backend"):
        if getattr(there.maker, name) != getattr(wanted.maker, name):
            what = {"encoder": "another encoder", "source": "other tiles"}.get(name, f"another {name}")
            raise TileIndexError(f"{folder} holds an index of {what}: give a new folder with --out")
    if there.areas != wanted.areas:
        raise TileIndexError(
            f"{folder} holds an index of {', '.join(map(str, there.areas))}, "
            f"not of {wanted.areas[0]}: give a new folder with --out"
        )
    return there


def _tiles(zoom: int, area: Region | None, land: bool) -> NDArray[np.int64]:
    if not land:
        return all_xy(zoom) if area is None else area.tiles(zoom)
    from geoengine.engine.regions.countries import Land

    return Land().tiles(zoom) if area is None else Overlap(area, Land()).tiles(zoom)


def _build_level(
    folder: Path, embed: Embed, zoom: int, ids: Ids, width: int, progress: BuildProgress
) -> None:
    """Embed the tiles of a level that no part has yet, and join the parts."""
    known = np.zeros(len(ids), dtype=bool)
    for segment in _segments(folder, zoom):
        known |= (find(segment.ids, ids) >= 0) | (find(segment.missing, ids) >= 0)
    rest = ids[~known]
    before = len(ids) - len(rest)
    progress(zoom, before, len(ids))
    parts = [rest[start : start + TILES_PER_PART] for start in range(0, len(rest), TILES_PER_PART)]
    embed(zoom, parts, lambda done: progress(zoom, before + done, len(ids)))
    segments = _segments(folder, zoom)
    if not segments:
        write_segment(level_file(folder, zoom), zoom, ids, ids, width, [])
    else:
        merge_segments(level_file(folder, zoom), segments)


def _segments(folder: Path, zoom: int) -> list[Segment]:
    return [Segment.open(file) for z, file in index_files(folder) if z == zoom]


@dataclass(frozen=True, slots=True)
class Embedder:
    """Embeds tiles of a source into parts of an index, of embeddings of length `width`."""

    folder: Path
    source: TileSource
    backend: Backend
    width: int

    def embed(self, zoom: int, parts: Sequence[Ids], note: Callable[[int], None]) -> None:
        """Embed one part after the other; see `Embed`."""
        done = 0
        for ids in parts:
            self.embed_part(zoom, ids, partial(_add, note, done))
            done += len(ids)
            note(done)

    def embed_part(self, zoom: int, ids: Ids, note: Callable[[int], None]) -> None:
        """Embed tiles into a file, whose name tells these tiles from others; `note` hears of tiles done.

        What the source and the backend raise passes through; IndexFileError when it cannot be written.
        """
        embeddings = self.backend.rows(encoder_name(zoom), len(ids))
        arrived = hand_on(
            self.source,
            zoom,
            tiles_of_ids(ids),
            embeddings.append,
            batch=self.backend.batch,
            progress=note,
        )
        there = arrived.rows >= 0
        rows = [embeddings.download()[arrived.rows[there]]] if there.any() else []
        write_segment(part_of(self.folder, zoom, ids), zoom, ids[there], ids[~there], self.width, rows)


def part_of(folder: Path, zoom: int, ids: Ids) -> Path:
    """Return the file of the part with these tiles, whose name others do not have."""
    return folder / PARTS / f"z{zoom:02d}-{fingerprint(ids.astype('<u8').tobytes())[:16]}.rows"


def _add(note: Callable[[int], None], before: int, count: int) -> None:
    note(before + count)


def _drop_parts(folder: Path, zoom: int) -> None:
    for z, file in index_files(folder):
        if z == zoom and file.parent.name == PARTS:
            file.unlink()
