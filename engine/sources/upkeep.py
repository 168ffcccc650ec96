"""Looking after files of tiles: what is in them, whether they are whole, and making them smaller."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from geoengine.engine.errors import SourceError
from geoengine.engine.sources.cache import (
    STATE_TABLE,
    delete_tiles,
    evict,
    is_intact,
    transaction,
    used_bytes,
)
from geoengine.engine.sources.decode import read_picture
from geoengine.engine.sources.mbtiles import connect_readonly
from geoengine.engine.tiles import Tile, tile_count

_EVERY_KEY = "SELECT zoom_level, tile_column, tile_row FROM {}"
_REPORTED = 1000  # tiles looked at between two reports of progress

Key = tuple[int, int, int]
"""Zoom, column and TMS row of a tile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What an MBTiles file holds; `missing` tiles are known not to exist."""

    path: Path
    metadata: dict[str, str]
    tiles_per_zoom: dict[int, int]
    missing: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was found in an MBTiles file: damaged tiles, and what SQLite says of the file, "ok" if nothing."""

    tiles: int
    damaged: tuple[Tile, ...]
    file: str

    @property
    def is_whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged and self.file == "ok"


def contents(path: Path) -> Contents:
    """Return what an MBTiles file holds; raises SourceError for a file that is none or is damaged."""
    with _reading(path) as database:
        rows = database.execute("SELECT name, value FROM metadata")
        metadata = {str(name): str(value) for name, value in rows if value is not None}
        per_zoom = database.execute("SELECT zoom_level, count(*) FROM tiles GROUP BY 1 ORDER BY 1").fetchall()
        missing = 0
        if _is_ours(database):
            absent = f"SELECT count(*) FROM {STATE_TABLE} WHERE checksum IS NULL"
            missing = database.execute(absent).fetchone()[0]
        return Contents(
            path=path,
            metadata=metadata,
            tiles_per_zoom={int(zoom): count for zoom, count in per_zoom},
            missing=missing,
            bytes=used_bytes(database),
        )


def verify(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Verdict:
    """Decode every tile of an MBTiles file, and compare it with its checksum if it is in a cache.

    `progress` is called with the tiles done and in all. Raises SourceError for other files.
    """
    damaged: list[Tile] = []
    with _reading(path) as database:
        file = "; ".join(str(row[0]) for row in database.execute("PRAGMA integrity_check(3)"))
        database.text_factory = bytes
        total = database.execute("SELECT count(*) FROM tiles").fetchone()[0]
        checksums = f"LEFT JOIN {STATE_TABLE} USING (zoom_level, tile_column, tile_row)"
        query = (
            f"SELECT zoom_level, tile_column, tile_row, tile_data, checksum FROM tiles {checksums}"
            if _is_ours(database)
            else "SELECT zoom_level, tile_column, tile_row, tile_data, NULL FROM tiles"
        )
        for done, (*key, data, checksum) in enumerate(database.execute(query)):
            if done % _REPORTED == 0:
                progress(done, total)
            is_whole = checksum is None or is_intact(data, checksum)
            if not is_whole or (data and read_picture(data) is None):
                damaged.append(_tile(*key))
        progress(total, total)
    return Verdict(tiles=total, damaged=tuple(damaged), file=file)


def drop_tiles(path: Path, tiles: tuple[Tile, ...]) -> None:
    """Delete tiles from a cache, so that they are fetched again; raises SourceError for other files."""
    with _writing(path) as database, transaction(database):
        delete_tiles(database, [(tile.z, tile.x, tile_count(tile.z) - 1 - tile.y) for tile in tiles])


def prune(
    path: Path, *, limit_bytes: int | None = None, older_than_s: float | None = None
) -> tuple[int, int]:
    """Delete from a cache what has expired, what was not used for so long, and the oldest above a size.

    Returns how many tiles went, and by how many bytes the file shrank. Raises SourceError for a file that is
    not a cache or pack of this program, and for one that cannot be written.
    """
    with _writing(path) as database:
        before = path.stat().st_size
        now = time.time()
        where = "expires_at < ?" if older_than_s is None else "expires_at < ? OR used_at < ?"
        values = (now,) if older_than_s is None else (now, now - older_than_s)
        with transaction(database):
            keys = database.execute(f"{_EVERY_KEY.format(STATE_TABLE)} WHERE {where}", values).fetchall()
            delete_tiles(database, keys)
        deleted = len(keys)
        if limit_bytes is not None:
            deleted += evict(database, limit_bytes)
        database.executescript("PRAGMA incremental_vacuum")  # `execute` would free a single page
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return deleted, before - path.stat().st_size


def keys_of(path: Path, zoom: int) -> set[tuple[int, int]]:
    """Return column and TMS row of the tiles of a zoom that a cache or pack knows of, missing ones too."""
    if not path.is_file():
        return set()
    with _reading(path) as database:
        if not _is_ours(database):
            return set()
        query = f"SELECT tile_column, tile_row FROM {STATE_TABLE} WHERE zoom_level = ?"
        return set(database.execute(query, (zoom,)))


def mean_tile_bytes(path: Path) -> float:
    """Return the mean size of a file's tiles, 0.0 without any."""
    with _reading(path) as database:
        return float(database.execute("SELECT avg(length(tile_data)) FROM tiles").fetchone()[0] or 0.0)


def make_single_file(path: Path) -> None:
    """Bring a pack into the form in which it is one file, for programs that only read it."""
    with _writing(path) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        database.execute("PRAGMA journal_mode = DELETE").fetchall()


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    try:
        with closing(connect_readonly(path)) as database:
            yield database
    except sqlite3.Error as error:
        raise SourceError(f"{path}: this is no MBTiles file, or a damaged one ({error})") from error


@contextmanager
def _writing(path: Path) -> Iterator[sqlite3.Connection]:
    with _reading(path) as database:
        if not _is_ours(database):
            raise SourceError(f"{path}: this is not a cache or pack of geoengine, and is left as it is")
    try:
        with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as database:
            yield database
    except sqlite3.Error as error:
        raise SourceError(f"{path}: the file cannot be changed ({error})") from error


def _is_ours(database: sqlite3.Connection) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE name = ?"
    return database.execute(query, (STATE_TABLE,)).fetchone() is not None


def _tile(z: int, x: int, row: int) -> Tile:
    return Tile(z, x, tile_count(z) - 1 - row)
