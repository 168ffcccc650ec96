"""Tiles from an MBTiles file: an SQLite database of tiles, whose rows are counted from the south (TMS)."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geoengine.engine.cores import available_cores
from geoengine.engine.errors import SourceError
from geoengine.engine.sources import TileBatch
from geoengine.engine.sources.archive import TRIED, plain_text, side_of, vector_tiles
from geoengine.engine.sources.decode import Job, decode_tile, stream
from geoengine.engine.tiles import as_xy, tile_count

_TILE = "SELECT tile_data FROM tiles WHERE zoom_level = ? AND tile_column = ? AND tile_row = ?"
_FIRST_TILES = f"SELECT tile_data FROM tiles WHERE length(tile_data) > 0 LIMIT {TRIED}"


class MBTilesSource:
    """The pictures in an MBTiles file, which is opened for reading only; see the MBTiles 1.3 specification.

    Zooms outside the file's minzoom and maxzoom, and tiles with no bytes, are missing. Raises SourceError for
    a file that is not there, is no MBTiles file, is damaged, or holds vector tiles.
    """

    world = "earth"

    def __init__(self, path: Path) -> None:
        self.name = path.name
        if not path.is_file():
            raise SourceError(f"{path}: there is no such file")
        try:
            uri = f"{path.resolve().as_uri()}?mode=ro"
            self._database = sqlite3.connect(uri, uri=True, check_same_thread=False)
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
        self.attribution = plain_text(metadata.get("attribution", ""))
        self.min_zoom = self._zoom(metadata, "min")
        self.max_zoom = self._zoom(metadata, "max")
        self.tile_size = side_of(self.name, (data for (data,) in self._rows(_FIRST_TILES)))

    def _zoom(self, metadata: dict[str, str], end: str) -> int:
        try:
            return int(metadata[f"{end}zoom"])
        except (KeyError, ValueError):
            zoom = self._rows(f"SELECT {end}(zoom_level) FROM tiles")[0][0]
            return -1 if zoom is None else int(zoom)

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles of the request that the file has."""
        tiles = as_xy(z, xy).tolist()
        if self.min_zoom <= z <= self.max_zoom:
            yield from stream(
                self._jobs(z, tiles), workers=available_cores(), tile_size=lambda _: self.tile_size
            )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _jobs(self, z: int, tiles: list[list[int]]) -> Iterator[tuple[int, Job]]:
        # Looked up here, in the caller's thread, and decoded in the workers: a look-up takes microseconds.
        for position, (x, y) in enumerate(tiles):
            rows = self._rows(_TILE, (z, x, tile_count(z) - 1 - y))
            if rows:
                yield position, partial(decode_tile, rows[0][0])

    def _rows(self, query: str, values: tuple[int, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            with closing(self._database.execute(query, values)) as cursor:
                return cursor.fetchall()
        except sqlite3.Error as error:
            raise SourceError(f"{self.name}: this is no MBTiles file, or a damaged one ({error})") from error
