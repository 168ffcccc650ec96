"""Tiles kept on disk: an MBTiles file that any GIS tool opens, written by many processes at once."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from geoengine.engine.errors import SourceError
from geoengine.engine.sources.decode import format_of
from geoengine.engine.sources.mbtiles import IDENTITY_KEY, connect_readonly
from geoengine.engine.tiles import Tile, tms_row

STATE_TABLE = "geoengine_tiles"

_LEFT_AFTER_EVICTION = 0.9  # of the limit, so that not every write evicts
_EVICTED_AT_ONCE = 64
_TOUCH_AFTER_S = 600.0  # the time of use is only kept this exactly, to write less
_BATCH = 64
_BATCH_S = 0.2
_WAIT_FOR_OTHERS_S = 30.0

# What is known of a tile lies beside the table of tiles, so that this is just what MBTiles 1.3 says. A row
# without a checksum is a tile that the source does not have.
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS metadata (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS tiles (
  zoom_level INTEGER NOT NULL, tile_column INTEGER NOT NULL, tile_row INTEGER NOT NULL,
  tile_data BLOB NOT NULL, PRIMARY KEY (zoom_level, tile_column, tile_row));
CREATE TABLE IF NOT EXISTS {STATE_TABLE} (
  zoom_level INTEGER NOT NULL, tile_column INTEGER NOT NULL, tile_row INTEGER NOT NULL,
  checksum INTEGER, expires_at REAL, used_at REAL NOT NULL,
  PRIMARY KEY (zoom_level, tile_column, tile_row)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS {STATE_TABLE}_used ON {STATE_TABLE} (used_at);
COMMIT;
"""
_AT = "zoom_level = ? AND tile_column = ? AND tile_row = ?"
_GET = f"""
SELECT s.expires_at, s.used_at, s.checksum, t.tile_data FROM {STATE_TABLE} AS s
LEFT JOIN tiles AS t USING (zoom_level, tile_column, tile_row)
WHERE s.zoom_level = ? AND s.tile_column = ? AND s.tile_row = ?
"""
_WIDEN = """
INSERT INTO metadata VALUES ('{0}zoom', ?)
ON CONFLICT (name) DO UPDATE SET value = {0}(CAST(value AS INTEGER), CAST(excluded.value AS INTEGER))
"""
_OLDEST = f"SELECT zoom_level, tile_column, tile_row FROM {STATE_TABLE} ORDER BY used_at LIMIT ?"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """A tile in the cache; without data it is one that the source does not have."""

    data: bytes


class TileCache:
    """Tiles of one source in an MBTiles file, which is made when it is first needed.

    Many tiles are written in one transaction; threads and processes may share the file. Above `limit_bytes`
    (0 for no limit) the tiles used longest ago go. A cache that cannot be read or written says so once and is
    silent from then on: it never fails a search. Raises SourceError, when it is first used, only for a file
    of another source.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], *, limit_bytes: int = 0) -> None:
        self.path = path
        self._metadata = dict(metadata)
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()  # of what is below
        self._writing = threading.Lock()  # held while a batch is written
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._opened = self._warned = False
        self._pending: dict[Tile, tuple[bytes, float] | None] = {}  # None: to be forgotten
        self._used: set[Tile] = set()
        self._flushed_at = time.monotonic()

    @property
    def writable(self) -> bool:
        """Whether tiles are being kept."""
        self._open()
        return self._writer is not None

    def get(self, tiles: Iterable[Tile]) -> dict[Tile, Kept]:
        """Return those of the tiles that are in the cache and have not expired."""
        self._open()
        found: dict[Tile, Kept] = {}
        with self._lock:
            if self._reader is None:
                return found
            try:
                for tile in tiles:
                    kept = self._kept(self._reader, tile, time.time())
                    if kept is not None:
                        found[tile] = kept
            except sqlite3.Error as error:
                self._warn(f"cannot be read ({error})")
                self._reader.close()
                self._reader = None
        return found

    def put(self, tile: Tile, data: bytes, expires_at: float) -> None:
        """Keep a tile, or for no data that there is none, until a moment of `time.time()`."""
        self._queue(tile, (data, expires_at))

    def drop(self, tile: Tile) -> None:
        """Forget a tile."""
        self._queue(tile, None)

    def flush(self) -> None:
        """Write what waits."""
        with self._writing:
            self._write()

    def close(self) -> None:
        """Write what waits and close the file; closing twice is allowed."""
        self.flush()
        with self._lock:
            for database in (self._reader, self._writer):
                if database is not None:
                    database.close()
            self._reader = self._writer = None
            self._opened = True  # and stays closed

    def _kept(self, database: sqlite3.Connection, tile: Tile, now: float) -> Kept | None:
        row = database.execute(_GET, _key(tile)).fetchone()
        if row is None or (row[0] is not None and row[0] < now):
            return None
        _, used_at, checksum, data = row
        if checksum is not None and not is_intact(data, checksum):
            self._pending[tile] = None
            return None
        if now - used_at > _TOUCH_AFTER_S:
            self._used.add(tile)
        return Kept(b"" if checksum is None else data)

    def _queue(self, tile: Tile, item: tuple[bytes, float] | None) -> None:
        self._open()
        with self._lock:
            if self._writer is None:
                return
            self._pending[tile] = item
            is_due = len(self._pending) >= _BATCH or time.monotonic() - self._flushed_at > _BATCH_S
        if is_due and self._writing.acquire(blocking=False):  # otherwise a thread is writing already
            try:
                self._write()
            finally:
                self._writing.release()

    def _write(self) -> None:
        """Write what waits in one transaction; `_writing` is held."""
        with self._lock:
            database, self._flushed_at = self._writer, time.monotonic()
            pending, self._pending = self._pending, {}
            used, self._used = self._used, set()
        if database is None or not (pending or used):
            return
        try:
            with transaction(database):
                _write_tiles(database, pending, time.time())
                touched = ((time.time(), *_key(tile)) for tile in used - pending.keys())
                database.executemany(f"UPDATE {STATE_TABLE} SET used_at = ? WHERE {_AT}", touched)
            if self._limit_bytes and used_bytes(database) > self._limit_bytes:
                evict(database, int(_LEFT_AFTER_EVICTION * self._limit_bytes))
        except sqlite3.Error as error:
            self._warn(f"cannot be written ({error})")
            with self._lock:
                self._writer = None
            database.close()

    def _open(self) -> None:
        with self._lock:
            if self._opened:
                return
            self._opened = True
            try:
                self._writer = open_cache(self.path, self._metadata)
            except (sqlite3.Error, OSError) as error:
                self._warn(f"cannot be written ({error})")
            try:
                if self.path.is_file():
                    self._reader = connect_readonly(self.path)
                    self._reader.text_factory = bytes  # so that even a damaged tile can be looked at
            except sqlite3.Error as error:
                self._warn(f"cannot be read ({error})")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("the tile cache %s %s; the search goes on without it", self.path, what)


def open_cache(path: Path, metadata: Mapping[str, str]) -> sqlite3.Connection:
    """Open a cache for writing; make it, with its metadata, if there is none.

    Raises SourceError for an MBTiles file that is not the cache of this source, sqlite3.Error and OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(
        path, timeout=_WAIT_FOR_OTHERS_S, isolation_level=None, check_same_thread=False
    )
    try:
        owner = _owner(database)
        if owner != metadata[IDENTITY_KEY] and owner is not None:
            raise SourceError(f"{path}: this file holds tiles of another source: give another file")
        _prepare(database)
        with transaction(database):
            rows = [*metadata.items(), ("type", "baselayer"), ("version", "1")]
            database.executemany("INSERT OR IGNORE INTO metadata VALUES (?, ?)", rows)
    except BaseException:
        database.close()
        raise
    return database


def used_bytes(database: sqlite3.Connection) -> int:
    """Return the size of a database without its free pages."""
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def evict(database: sqlite3.Connection, limit_bytes: int) -> int:
    """Delete the tiles used longest ago until the others fit; returns how many."""
    deleted = 0
    while used_bytes(database) > limit_bytes:
        with transaction(database):
            oldest = database.execute(_OLDEST, (_EVICTED_AT_ONCE,)).fetchall()
            delete_tiles(database, oldest)
        if not oldest:
            break
        deleted += len(oldest)
    return deleted


def delete_tiles(database: sqlite3.Connection, keys: Iterable[tuple[int, int, int]]) -> None:
    """Delete tiles, given as (zoom, column, TMS row), and what is known of them."""
    keys = list(keys)
    for table in ("tiles", STATE_TABLE):
        database.executemany(f"DELETE FROM {table} WHERE {_AT}", keys)


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Run the block in a transaction, which is undone if it fails."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has ended it already
            database.execute("ROLLBACK")
        raise


def is_intact(data: object, checksum: int) -> bool:
    """Tell whether a tile's bytes are those that were written."""
    return isinstance(data, bytes) and zlib.crc32(data) == checksum


def _owner(database: sqlite3.Connection) -> str | None:
    """Return the identity in a file's metadata, "" for tiles of nobody known, None for an empty file."""
    if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'metadata'").fetchone() is None:
        return None
    row = database.execute("SELECT value FROM metadata WHERE name = ?", (IDENTITY_KEY,)).fetchone()
    if row is None and database.execute("SELECT 1 FROM metadata").fetchone() is None:
        return None  # a process that makes the same cache has not got further
    return "" if row is None else str(row[0])


def _prepare(database: sqlite3.Connection) -> None:
    """Make the tables; many processes may try that at once, and to change the journal does not wait."""
    deadline = time.monotonic() + _WAIT_FOR_OTHERS_S
    while True:
        try:
            database.execute("PRAGMA auto_vacuum = INCREMENTAL")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")  # loses the last tiles with the power, no more
            database.executescript(_SCHEMA)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _write_tiles(
    database: sqlite3.Connection, pending: Mapping[Tile, tuple[bytes, float] | None], now: float
) -> None:
    delete_tiles(database, (_key(tile) for tile, item in pending.items() if not (item and item[0])))
    kept = [(tile, *item) for tile, item in pending.items() if item is not None]
    database.executemany(
        "INSERT OR REPLACE INTO tiles VALUES (?, ?, ?, ?)",
        ((*_key(tile), data) for tile, data, _ in kept if data),
    )
    database.executemany(
        f"INSERT OR REPLACE INTO {STATE_TABLE} VALUES (?, ?, ?, ?, ?, ?)",
        (
            (*_key(tile), zlib.crc32(data) if data else None, None if until == float("inf") else until, now)
            for tile, data, until in kept
        ),
    )
    zooms = [tile.z for tile, data, _ in kept if data]
    if zooms:
        first = next(data for _, data, _ in kept if data)
        database.execute("INSERT OR IGNORE INTO metadata VALUES ('format', ?)", (format_of(first),))
        database.execute(_WIDEN.format("min"), (str(min(zooms)),))
        database.execute(_WIDEN.format("max"), (str(max(zooms)),))


def _key(tile: Tile) -> tuple[int, int, int]:
    return tile.z, tile.x, tms_row(tile)
