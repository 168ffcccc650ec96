"""Sets of photos listed in CSV and TSV files."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from geoengine.engine.photo_sets import PhotoEntry, PhotoSetError
from geoengine.engine.photo_sets.columns import find_columns
from geoengine.engine.photo_sets.rows import RowReader

if TYPE_CHECKING:
    from _csv import Reader

_COUNTED_BYTES = 64 << 20  # of files whose rows are counted, which takes about a second


class TextTableSet:
    """The photos that CSV or TSV files list, one in a row; a file's first row names its columns.

    Cells are separated by commas, semicolons, tabs or bars, whichever the first row has. A file of two
    columns without names, the second an address, lists ids and addresses, as MP-16's does.
    """

    def __init__(self, files: Sequence[Path], name: str, photos: Path | None, *, need_place: bool) -> None:
        self.name = name
        self._files = list(files)
        self._photos = photos
        self._need_place = need_place
        for file in files:
            with _opened(file) as stream:
                self._start(file, stream)

    @cached_property
    def identity(self) -> str:
        """Return the hash of the files' bytes."""
        digest = hashlib.sha256()
        for file in self._files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[PhotoEntry]:
        for file in self._files:
            with _opened(file) as stream:
                names, reader, rows = self._start(file, stream)
                for cells in rows:
                    if not cells:
                        continue  # an empty line
                    if len(cells) != len(names):
                        raise PhotoSetError(
                            f"{file}, row {rows.line_num}: it has {len(cells)} cells, expected {len(names)}"
                        )
                    yield reader.entry(rows.line_num, dict(zip(names, cells, strict=True)))

    def count(self) -> int | None:
        """Return the number of rows, or None for large files."""
        if sum(file.stat().st_size for file in self._files) > _COUNTED_BYTES:
            return None
        total = 0
        for file in self._files:
            with _opened(file) as stream:
                total += sum(1 for cells in self._start(file, stream)[2] if cells)
        return total

    def _start(self, file: Path, stream: TextIO) -> tuple[list[str], RowReader, Reader]:
        """Read the first row; returns the columns' names, what makes entries of rows, and the other rows."""
        first = stream.readline()
        if not first.strip():
            raise PhotoSetError(f"{file}: expected column names in its first row; it is empty")
        counts = {mark: first.count(mark) for mark in ",;\t|"}
        mark = max(counts, key=lambda each: counts[each])
        stream.seek(0)
        rows = csv.reader(stream, delimiter=mark, strict=True)
        names = next(rows)
        if len(names) == 2 and names[1].strip().startswith(("http://", "https://")):
            stream.seek(0)
            names, rows = ["id", "url"], csv.reader(stream, delimiter=mark, strict=True)
        columns = find_columns(names, str(file), need_place=self._need_place)
        reader = RowReader(
            columns=columns,
            table=str(file),
            folder=self._photos or file.parent,
            by_key=self._photos is not None or (columns.file is None and columns.url is None),
            need_place=self._need_place,
        )
        return names, reader, rows


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """Open a table; its errors, also those found in reading, become PhotoSetError."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise PhotoSetError(f"{file}: the file is not UTF-8 text; save it as UTF-8") from error
    except csv.Error as error:
        raise PhotoSetError(f"{file}: a row cannot be read ({error})") from error
    except OSError as error:
        raise PhotoSetError(f"{file}: the file cannot be read ({error.strerror})") from error
