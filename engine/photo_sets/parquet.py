"""Sets of photos listed, or kept, in Parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from geoengine.engine.extras import require_extra
from geoengine.engine.photo_sets import PhotoEntry, PhotoSetError
from geoengine.engine.photo_sets.columns import find_columns
from geoengine.engine.photo_sets.rows import RowReader

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_ROWS = 4096  # read at a time
_PICTURES = 16  # read at a time, where the rows hold pictures


class ParquetSet:
    """The photos that Parquet files list, one in a row, or keep in a column `jpg` or `image`."""

    def __init__(self, files: Sequence[Path], name: str, photos: Path | None, *, need_place: bool) -> None:
        require_extra("parquet", ("pyarrow",), "reading Parquet files")
        self.name = name
        self._files = list(files)
        self._photos = photos
        self._need_place = need_place
        for file in files:
            with _opened(file) as table:
                self._reader(file, table)

    @cached_property
    def identity(self) -> str:
        """Return the hash of the files' sizes and of their footers, which describe all that is in them."""
        digest = hashlib.sha256()
        for file in self._files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                stream.seek(size - 8)
                footer = int.from_bytes(stream.read(4), "little")
                stream.seek(max(0, size - 8 - footer))
                digest.update(f"{size}\n".encode() + stream.read())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[PhotoEntry]:
        import pyarrow as pa

        for file in self._files:
            with _opened(file) as table:
                reader, row = self._reader(file, table), 0
                used = reader.columns.used
                kinds = [table.schema_arrow.field(name).type for name in used]
                holds_pictures = any(
                    pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
                    for kind in kinds
                )
                for batch in table.iter_batches(_PICTURES if holds_pictures else _ROWS, columns=used):
                    for values in batch.to_pylist():
                        row += 1
                        yield reader.entry(row, values)

    def count(self) -> int:
        """Return the number of rows, which the files say."""
        total = 0
        for file in self._files:
            with _opened(file) as table:
                total += table.metadata.num_rows
        return total

    def _reader(self, file: Path, table: ParquetFile) -> RowReader:
        columns = find_columns(table.schema_arrow.names, str(file), need_place=self._need_place)
        return RowReader(
            columns=columns,
            table=str(file),
            folder=self._photos or file.parent,
            by_key=self._photos is not None or (columns.file is None and columns.url is None),
            need_place=self._need_place,
        )


@contextmanager
def _opened(file: Path) -> Iterator[ParquetFile]:
    """Open a Parquet file; its errors, also those found in reading, become PhotoSetError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise PhotoSetError(f"{file}: the Parquet file is damaged or cannot be read ({reason})") from error
