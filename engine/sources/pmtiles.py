"""Tiles from a PMTiles 3 file: tiles along a Hilbert curve, rows counted from the north (XYZ)."""

from __future__ import annotations

import gzip
import json
import mmap
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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

if TYPE_CHECKING:
    from pmtiles.tile import Entry, HeaderDict

FIRST_BYTES = 16 << 10
"""Within these lie the header and the root directory; see the specification, 3."""

_HEADER_BYTES = 127
_MOST_DEPTH = 4  # directories from the root to a tile, as in the format's own readers
_CACHED = 64  # directories kept parsed; one has some thousand entries
_DAMAGE = (EOFError, OSError, RecursionError, ValueError, zlib.error)  # what parsing damaged bytes raises


class ByteFile(Protocol):
    """A file that is read in parts."""

    name: str

    def read(self, offset: int, length: int) -> bytes:
        """Return a part of the file, shorter where the file ends."""

    def close(self) -> None:
        """Let go of the file; closing twice is allowed."""


class MappedFile:
    """A file on disk, mapped into memory; raises SourceError when it cannot be."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        if not path.is_file():
            raise SourceError(f"{path}: there is no such file")
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise SourceError(f"{path}: the file cannot be opened ({error})") from error

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return len(self._map)

    def read(self, offset: int, length: int) -> bytes:
        """Return a part of the file, shorter where the file ends."""
        try:
            return self._map[offset : offset + length]
        except ValueError as error:
            raise SourceError(f"{self.name}: the file is closed") from error

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()


class PMTilesSource(ArchiveSource):
    """The pictures in a PMTiles archive; see the PMTiles 3 specification.

    Zooms outside the archive's minzoom and maxzoom, and tiles that are no picture, are missing. Raises
    SourceError for a file that is no PMTiles 3 file, is cut short or damaged, or holds vector tiles.
    """

    def __init__(self, file: ByteFile) -> None:
        self._source, self._file = file, file.name
        # Not a decorator, which would share one cache among all sources and keep them alive.
        self._directory = lru_cache(_CACHED)(self._read_directory)
        try:
            self._header = self._read_header()
            self._read_description()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> HeaderDict:
        from pmtiles.tile import deserialize_header

        if self._source.read(0, 7) != b"PMTiles":
            raise SourceError(f"{self._file}: this is no PMTiles file")
        if self._source.read(7, 1) != b"\x03":
            raise SourceError(f"{self._file}: this is not version 3 of PMTiles, which alone is read")
        try:
            header = deserialize_header(self._bytes(0, _HEADER_BYTES))
        except _DAMAGE as error:
            raise self._damaged(error) from error
        sections = (
            (header["root_offset"], header["root_length"]),
            (header["metadata_offset"], header["metadata_length"]),
            (header["leaf_directory_offset"], header["leaf_directory_length"]),
            (header["tile_data_offset"], header["tile_data_length"]),
        )
        end, size = max(offset + length for offset, length in sections), self._size()
        if size is not None and end > size:
            raise SourceError(f"{self._file}: this file is cut short, {size} of its {end} bytes are there")
        internal, tiles = header["internal_compression"].name, header["tile_compression"].name
        if internal != "GZIP" or tiles in ("BROTLI", "ZSTD"):
            raise SourceError(
                f"{self._file}: this file's directories need gzip compression and its tiles gzip or none, "
                f"but it has {internal.lower()} and {tiles.lower()}"
            )
        return header

    def _read_description(self) -> None:
        header = self._header
        if header["tile_type"].name in ("MVT", "MLT"):
            raise vector_tiles(self._file)
        metadata = self._metadata()
        self.name = plain_text(str(metadata.get("name") or "")) or self._file
        self.attribution = plain_text(str(metadata.get("attribution") or ""))
        south_west = header["min_lon_e7"], header["min_lat_e7"]
        north_east = header["max_lon_e7"], header["max_lat_e7"]
        self.bounds = bounds_of([degrees_e7 / 1e7 for degrees_e7 in south_west + north_east])
        self.min_zoom = header["min_zoom"]
        self.max_zoom = header["max_zoom"]
        root = self._bytes(header["root_offset"], header["root_length"])
        self.identity = fingerprint("pmtiles", self._bytes(0, _HEADER_BYTES), root)
        first = islice(self._entries(header["root_offset"], header["root_length"]), TRIED)
        self.tile_size = side_of(self._file, map(self._tile, first))

    def _metadata(self) -> dict[str, Any]:
        packed = self._bytes(self._header["metadata_offset"], self._header["metadata_length"])
        try:
            metadata = json.loads(gzip.decompress(packed))
        except _DAMAGE as error:
            raise self._damaged(error) from error
        if not isinstance(metadata, dict):
            raise self._damaged("its metadata is no JSON object")
        return metadata

    def _size(self) -> int | None:
        return self._source.size if isinstance(self._source, MappedFile) else None

    def place_of(self, z: int, x: int, y: int) -> tuple[int, int] | None:
        """Return a tile's offset and length in the file, or None when the archive does not have it."""
        from pmtiles.tile import zxy_to_tileid

        entry = self._find(zxy_to_tileid(z, x, y))
        return None if entry is None else (self._header["tile_data_offset"] + entry.offset, entry.length)

    def tile_data(self, z: int, x: int, y: int) -> bytes | None:
        """Return a tile's bytes, or None when the archive does not have it."""
        place = self.place_of(z, x, y)
        return None if place is None else self._bytes(*place)

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def _find(self, tile_id: int) -> Entry | None:
        from pmtiles.tile import find_tile

        offset, length = self._header["root_offset"], self._header["root_length"]
        for _ in range(_MOST_DEPTH):
            entry = find_tile(self._directory(offset, length), tile_id)
            if entry is None or entry.run_length > 0:
                return entry
            offset, length = self._leaf(entry)
        raise self._damaged("its directories are nested too deep")

    def _entries(self, offset: int, length: int, depth: int = 1) -> Iterator[Entry]:
        """Yield the entries of tiles in a directory and in those below it, in the order of the curve."""
        if depth > _MOST_DEPTH:
            raise self._damaged("its directories are nested too deep")
        for entry in self._directory(offset, length):
            if entry.run_length > 0:
                yield entry
            else:
                yield from self._entries(*self._leaf(entry), depth + 1)

    def _leaf(self, entry: Entry) -> tuple[int, int]:
        return self._header["leaf_directory_offset"] + entry.offset, entry.length

    def _read_directory(self, offset: int, length: int) -> list[Entry]:
        from pmtiles.tile import deserialize_directory

        packed = self._bytes(offset, length)
        try:
            return deserialize_directory(packed)
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def _tile(self, entry: Entry) -> bytes:
        return self._bytes(self._header["tile_data_offset"] + entry.offset, entry.length)

    def _bytes(self, offset: int, length: int) -> bytes:
        data = self._source.read(offset, length)
        if len(data) < length:
            raise self._damaged("it points past its end")
        return data

    def _damaged(self, why: object) -> SourceError:
        return SourceError(f"{self._file}: this PMTiles file is damaged ({why})")
