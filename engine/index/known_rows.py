"""What a search knows of tiles before it reads them: a tile index, and rows kept from earlier searches."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.errors import GeoEngineError
from geoengine.engine.index.building import building, new_part
from geoengine.engine.index.errors import IndexFileError, TileIndexError
from geoengine.engine.index.segments import HalfRows, Ids, Segment, merge_segments, write_segment
from geoengine.engine.index.tile_index import (
    MANIFEST,
    PARTS,
    Description,
    Maker,
    Table,
    TileIndex,
    index_files,
)
from geoengine.engine.regions import Region
from geoengine.engine.sources import fingerprint

MOST_BYTES = 2 << 30
"""Of rows kept from searches: two million tiles. The oldest files go when there are more."""

_JOINED_PARTS = 32
_LARGE = 32 << 20  # bytes; larger files are left as they are

_log = logging.getLogger(__name__)


def row_cache_folder() -> Path | None:
    """Return where rows of searches are kept, or None when the environment variable GEOENGINE_CACHE is "off".

    That is `rows` in the folder GEOENGINE_CACHE or, by default, in the user's folder for caches.
    """
    chosen = os.environ.get("GEOENGINE_CACHE", "").strip()
    if chosen.lower() == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache"
    return (Path(chosen).expanduser() if chosen else Path(base) / "geoengine") / "rows"


class RowCache:
    """Embeddings of tiles met in searches, in a folder that any number of processes share.

    Each set of encoders, backend, variant and tiles has a folder of its own in `home`, so that a row is the
    one that the search would compute. What cannot be read or written is not cached: one warning says so.
    """

    def __init__(self, home: Path, maker: Maker) -> None:
        key = fingerprint(maker.encoder, maker.source, maker.backend, maker.variant)[:16]
        self.folder = home / key
        self._maker = maker
        self._index: TileIndex | None = None
        self._seen: set[Path] = set()
        self._usable = True
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """See what other processes have added."""
        if not self._usable:
            return
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        try:
            if self._index is None:
                if not (self.folder / MANIFEST).exists():
                    (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
                    Description(maker=self._maker).write(self.folder)
                self._index = TileIndex(self.folder, files=False)
            there = dict.fromkeys(index_files(self.folder))
            for zoom, file in there:
                if file not in self._seen:
                    self._seen.add(file)
                    self._map(self._index, zoom, file)
            for zoom, segments in self._index.segments.items():  # others have joined files, or dropped them
                self._index.segments[zoom] = [s for s in segments if (zoom, s.path) in there]
        except (GeoEngineError, OSError) as error:
            self._give_up(error)

    def look_up(self, zoom: int, ids: Ids, into: HalfRows) -> NDArray[np.bool_]:
        """Copy the embeddings of tiles into fp16[n, d]; return which were found."""
        if self._index is None:
            return np.zeros(len(ids), dtype=bool)
        return self._index.look_up(zoom, ids, into)[0]

    def keep(self, zoom: int, ids: Ids, rows: HalfRows) -> None:
        """Add tiles, whose ids are sorted, and their embeddings fp16[n, d]."""
        if self._index is None or not self._usable or not len(ids):
            return
        file = new_part(self.folder, zoom)
        with self._lock:
            try:
                write_segment(file, zoom, ids, ids[:0], rows.shape[1], [rows])
                self._seen.add(file)
                self._map(self._index, zoom, file)
                self._tidy(zoom)
            except (GeoEngineError, OSError) as error:
                self._give_up(error)

    def _map(self, index: TileIndex, zoom: int, file: Path) -> None:
        try:
            index.add(zoom, file)
        except FileNotFoundError:
            pass  # another process has just joined it with others
        except IndexFileError as error:
            _log.warning("%s; it is deleted", error)
            file.unlink(missing_ok=True)

    def _tidy(self, zoom: int) -> None:
        """Join a level's small files when there are many, and drop the oldest when all are too large."""
        assert self._index is not None
        small = [s for s in self._index.segments[zoom] if s.rows.nbytes < _LARGE]
        if len(small) < _JOINED_PARTS:
            return
        with contextlib.suppress(TileIndexError), building(self.folder):  # or another process is at it
            joined = new_part(self.folder, zoom)
            merge_segments(joined, small)
            self._drop(zoom, small)
            self._seen.add(joined)
            self._index.add(zoom, joined)
            self._shrink()

    def _drop(self, zoom: int, segments: list[Segment]) -> None:
        assert self._index is not None
        for segment in segments:
            segment.path.unlink(missing_ok=True)
        kept = [segment for segment in self._index.segments[zoom] if segment not in segments]
        self._index.segments[zoom] = kept

    def _shrink(self) -> None:
        assert self._index is not None
        files = [
            (s.path.stat().st_mtime, z, s)
            for z, level in self._index.segments.items()
            for s in level
            if s.path.exists()  # another process may have joined it with others
        ]
        files.sort(key=lambda entry: entry[0])
        total = sum(segment.rows.nbytes for _, _, segment in files)
        for _, zoom, segment in files:
            if total <= MOST_BYTES:
                return
            self._drop(zoom, [segment])
            total -= segment.rows.nbytes

    def _give_up(self, error: Exception) -> None:
        self._usable = False
        _log.warning("the search goes on without its row cache: %s", error)


class RowStore(Protocol):
    """What keeps embeddings of tiles for later searches: `RowCache`, or `MemoryRows`."""

    def refresh(self) -> None:
        """See what others have added, before a search."""
        ...

    def look_up(self, zoom: int, ids: Ids, into: HalfRows) -> NDArray[np.bool_]:
        """Copy the embeddings of tiles into fp16[n, d]; return which were found."""
        ...

    def keep(self, zoom: int, ids: Ids, rows: HalfRows) -> None:
        """Add tiles, whose ids are sorted, and their embeddings fp16[n, d]."""
        ...


class KnownRows:
    """An index, a cache of rows, or both, as one search sees them; `width` is the length of an embedding."""

    def __init__(self, width: int, index: TileIndex | None, cache: RowStore | None) -> None:
        self.width, self.index, self.cache = width, index, cache

    def refresh(self) -> None:
        """See what other processes have added, before a search."""
        if self.cache is not None:
            self.cache.refresh()

    def table(self, zoom: int, area: Region | None) -> Table | None:
        """Return all embeddings of a zoom's tiles in an area; None where they are not all known."""
        return None if self.index is None else self.index.table(zoom, area)

    def look_up(self, zoom: int, ids: Ids) -> tuple[HalfRows, NDArray[np.bool_], NDArray[np.bool_]]:
        """Return embeddings fp16[n, d], which of them are known, and which tiles are known to be missing."""
        rows = np.zeros((len(ids), self.width), dtype=np.float16)
        found = missing = np.zeros(len(ids), dtype=bool)
        if self.index is not None:
            found, missing = self.index.look_up(zoom, ids, rows)
        if self.cache is not None and not found.all():
            rest = np.flatnonzero(~found)
            more = np.zeros((len(rest), self.width), dtype=np.float16)
            cached = self.cache.look_up(zoom, ids[rest], more)
            rows[rest[cached]] = more[cached]
            found[rest[cached]] = True
        return rows, found, missing & ~found

    def keep(self, zoom: int, ids: Ids, rows: HalfRows) -> None:
        """Add tiles, whose ids are sorted, and their embeddings fp16[n, d], for later searches."""
        if self.cache is not None:
            self.cache.keep(zoom, ids, rows)
