"""Sets of photos, however they are listed: folders, tables, WebDataset tars; read as a stream, many times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from geoengine.engine.errors import GeoEngineError, PhotoError
from geoengine.engine.photos import opened_photo
from geoengine.engine.tiles import LngLat

_MOST_BYTES = 512 << 20  # of one photo's file


class PhotoSetError(GeoEngineError):
    """A set of photos cannot be read, or lacks what is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoEntry:
    """One photo of a set.

    `key` is the table's id, the path inside the folder, or the stem of the tar's member; it is the same in
    every reading. It is unique if the ids are, which nothing checks: that would take memory for each photo.
    `row` is what messages call the entry: the line of a CSV file, the number of the row, sample or file,
    from 1. `file` is where the photo lies, from byte `offset` on, `size` bytes or to the end; None when only
    a `url` is known. `data` are the bytes of a photo that lies inside a Parquet file: do not keep many such
    entries. All but those are small, and can be sent to other processes.
    """

    key: str
    row: int
    place: LngLat | None = None
    author: str = ""
    url: str = ""
    file: Path | None = None
    offset: int = 0
    size: int | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """Return the bytes of the photo's file; raises PhotoError when it is not there."""
        if self.data is not None:
            return self.data
        if self.file is None:
            where = f"only its address {self.url} is known" if self.url else "the set names no file"
            raise PhotoError(f"{self.key}: {where}; download the photos first, with geoengine prepare")
        with opened_photo(self.file, str(self.file)) as stream:
            try:
                stream.seek(self.offset)
                data = stream.read(_MOST_BYTES + 1 if self.size is None else self.size)
            except OSError as error:
                raise PhotoError(f"{self.file}: it cannot be read ({error.strerror})") from error
        if len(data) > _MOST_BYTES:
            raise PhotoError(f"{self.file}: the file has more than {_MOST_BYTES >> 20} MiB")
        if self.size is not None and len(data) < self.size:
            raise PhotoError(f"{self.file}: the file has become shorter while it was read")
        return data


class PhotoSet(Protocol):
    """Photos, listed in the same order each time; reading them holds no more than a few entries in memory."""

    @property
    def name(self) -> str:
        """What people are told of it."""
        ...

    @property
    def identity(self) -> str:
        """What tells the set from others, SHA-256 in hex: a job goes on only with the set it began with."""
        ...

    def __iter__(self) -> Iterator[PhotoEntry]:
        """Yield the entries; raises PhotoSetError where the set is damaged or a row makes no sense."""
        ...

    def count(self) -> int | None:
        """Return the number of entries, or None where finding out takes about as long as reading them."""
        ...


def open_photo_set(spec: Path | str, *, photos: Path | None = None, need_place: bool = False) -> PhotoSet:
    """Open a photo, a folder, a CSV, TSV or Parquet table, or WebDataset tars as a set of photos.

    Several tables or tars are named by a pattern, such as `train-{000..127}.tar` or `train-*.tar`. A folder
    stands for all images in it and in its folders; for its tars, when it holds some and no image; and with
    `need_place` for the one table in it. The files that a table names are looked for in the folder `photos`,
    by default the table's own.

    With `need_place`, every entry has a place. Without, a place that is missing or impossible is None.
    Raises PhotoSetError, also when Parquet is asked for and its extra is missing.
    """
    from geoengine.engine.photo_sets.opening import open_spec

    return open_spec(spec, photos=photos, need_place=need_place)
