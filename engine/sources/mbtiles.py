"""Tiles from an MBTiles file: an SQLite database of tiles, whose rows are counted from the south (TMS)."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import fingerprint
from geoengine.engine.sources.archive import (
    TRIED,
    ArchiveSource,
    bounds_of,
    plain_text,
    side_of,
    vector_tiles,
)
from geoengine.engine.tiles import tile_count

IDENTITY_KEY = "geoengine:identity"
"""The metadata row in which caches and packs keep the identity of the source that they were filled from."""

_TILE = "SELECT tile_data FROM tiles WHERE zoom_level = ? AND tile_column = ? AND tile_row = ?"
_FIRST_TILES = f"SELECT tile_data FROM tiles WHERE length(tile_data) > 0 LIMIT {TRIED}"

# A table of the rows' places, for files in which each look-up would read every row. The last of equals wins.
_PLACES = (
    "CREATE TEMP TABLE places (z, x, y, place, PRIMARY KEY (z, x, y)) WITHOUT ROWID",
    "INSERT OR REPLACE INTO places SELECT zoom_level, tile_column, tile_row, rowid FROM tiles",
)
_TILE_AT_PLACE = (
    "SELECT tile_data FROM tiles WHERE rowid = (SELECT place FROM places WHERE z = ? AND x = ? AND y = ?)"
)


class MBTilesSource(ArchiveSource):
    """The pictures in an MBTiles file, which is opened for reading only; see the MBTiles 1.3 specification.

    Zooms outside the file's minzoom and maxzoom, and tiles with no bytes, are missing. Raises SourceError for
    a file that is not there, is no MBTiles file, is damaged, or holds vector tiles. A file without an index
    of its tiles is given one in memory.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        if not path.is_file():
            raise SourceError(f"{path}: there is no such file")
        try:
            self._database = connect_readonly(path)
        except sqlite3.Error as error:
            raise SourceError(f"{path}: the file cannot be opened ({error})") from error
        try:
            self._read_description()
        except BaseException:
            self.close()
            raise

    def _read_description(self) -> None:
        rows = self._rows("SELECT name, value FROM metadata")
        metadata = {str(key): str(value) for key, value in rows if value is not None}
        if metadata.get("format") in ("pbf", "mvt"):
            raise vector_tiles(self.name)
        first = [data for (data,) in self._rows(_FIRST_TILES)]
        self.identity = metadata.get(IDENTITY_KEY) or _identity(metadata, first)
        self.attribution = plain_text(metadata.get("attribution", ""))
        self.min_zoom = self._zoom(metadata, "min")
        self.max_zoom = self._zoom(metadata, "max")
        self.bounds = bounds_of(metadata.get("bounds", "").split(","))
        self.tile_size = side_of(self.name, first)
        self._query = _TILE
        if self._is_unindexed():
            for statement in _PLACES:
                self._rows(statement)
            self._query = _TILE_AT_PLACE

    def _zoom(self, metadata: dict[str, str], end: str) -> int:
        try:
            return int(metadata[f"{end}zoom"])
        except (KeyError, ValueError):
            zoom = self._rows(f"SELECT {end}(zoom_level) FROM tiles")[0][0]
            return -1 if zoom is None else int(zoom)

    def tile_data(self, z: int, x: int, y: int) -> object | None:
        """Return a tile's bytes, or None when the file does not have it."""
        rows = self._rows(self._query, (z, x, tile_count(z) - 1 - y))
        return rows[0][0] if rows else None

    def _is_unindexed(self) -> bool:
        plan = self._rows(f"EXPLAIN QUERY PLAN {_TILE}", (0, 0, 0))
        kind = self._rows("SELECT type FROM sqlite_master WHERE name = 'tiles'")
        return kind == [("table",)] and any("SCAN" in str(row[-1]) for row in plan)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _rows(self, query: str, values: tuple[int, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            with closing(self._database.execute(query, values)) as cursor:
                return cursor.fetchall()
        except sqlite3.Error as error:
            raise SourceError(f"{self.name}: this is no MBTiles file, or a damaged one ({error})") from error


def connect_readonly(path: Path) -> sqlite3.Connection:
    """Open a database for reading only; one in a folder that cannot be written too. Raises sqlite3.Error."""
    uri = path.resolve().as_uri()
    database = sqlite3.connect(f"{uri}?mode=ro", uri=True, check_same_thread=False)
    try:
        database.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        # A database with a write-ahead log needs a file beside it, unless it is said that nobody writes.
        database.close()
        if path.with_name(f"{path.name}-wal").exists():
            raise
        database = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    except sqlite3.DatabaseError:
        pass  # no database at all, which the first query says
    return database


def _identity(metadata: dict[str, str], first: list[object]) -> str:
    described = (f"{key}={value}" for key, value in sorted(metadata.items()))
    return fingerprint("mbtiles", *described, *(data for data in first if isinstance(data, str | bytes)))
