"""What results are written as: JSON lines, CSV or GeoParquet; parts, and parts joined into one file."""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoengine.engine.errors import GeoEngineError
from geoengine.engine.extras import require_extra
from geoengine.engine.render.files import writing
from geoengine.engine.render.json_lines import json_object
from geoengine.engine.results import HYPOTHESIS, Location

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("photo", "world", "latitude", "longitude", "radius_km", "score", "share", "z", "x", "y")
"""Of CSV and GeoParquet files; members of the JSON result, and of its first candidate."""

_OF_CANDIDATES = ("latitude", "longitude", "score", "share")
_ROWS_PER_GROUP = 16_384  # of a joined GeoParquet file: about a megabyte, which a reader takes at once


class ResultFormat(StrEnum):
    """A format of results; its value is the suffix of its files."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"

    @classmethod
    def of(cls, path: Path) -> ResultFormat | None:
        """Return the format that a file's suffix names, None for a folder; raises GeoEngineError."""
        suffix = path.suffix.lower().removeprefix(".")
        suffix = {"geoparquet": "parquet", "ndjson": "jsonl"}.get(suffix, suffix)
        if suffix in list(cls):
            return cls(suffix)
        if suffix and not path.is_dir():
            raise GeoEngineError(
                f"{path}: results are written as .jsonl, .csv or .parquet, or as parts into a folder, "
                "whose name has no suffix"
            )
        return None

    def require(self) -> None:
        """Raise MissingExtraError when what the format needs is not installed."""
        if self is ResultFormat.PARQUET:
            require_extra("parquet", ("pyarrow",), "writing GeoParquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultFiles:
    """Writes the result files of one job; each appears when it is complete.

    `world` is the one that the results are about; `about` is told to readers of GeoParquet files.
    """

    format: ResultFormat
    world: str
    about: dict[str, str]

    def write(self, path: Path, records: Iterable[dict[str, Any]]) -> None:
        """Write records of `record_of`; raises OutputError."""
        if self.format is ResultFormat.PARQUET:
            self._write_tables(path, [self._table(list(records))])
            return
        text = _json_text(records) if self.format is ResultFormat.JSONL else _csv_text(records)
        with writing(path) as file:
            file.write(text.encode())

    def join(self, path: Path, parts: Iterable[Path]) -> None:
        """Write the rows of several files as one, in their order; raises OutputError."""
        if self.format is ResultFormat.PARQUET:
            self._write_tables(path, _read_tables(parts))
            return
        with writing(path) as file:
            for number, part in enumerate(parts):
                with part.open("rb") as rows:
                    if self.format is ResultFormat.CSV and number:
                        rows.readline()
                    while block := rows.read(1 << 20):
                        file.write(block)

    def _write_tables(self, path: Path, tables: Iterable[pyarrow.Table]) -> None:
        import pyarrow.parquet as pq

        schema = self._schema()
        with writing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)

    def _table(self, records: list[dict[str, Any]]) -> pyarrow.Table:
        import pyarrow as pa

        schema = self._schema()
        rows = [_row(record) for record in records]
        columns: list[list[Any]] = [[row[name] for row in rows] for name in COLUMNS]
        columns.append(
            [[{name: c[name] for name in _OF_CANDIDATES} for c in r["candidates"]] for r in records]
        )
        columns.append([struct.pack("<BIdd", 1, 1, row["longitude"], row["latitude"]) for row in rows])
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _schema(self) -> pyarrow.Schema:
        """Return the columns, the candidates, and the answer as a point, with the metadata of GeoParquet 1.1.

        Points are little-endian WKB. Where no reference system is named, it is OGC:CRS84, longitude and
        latitude in degrees; positions on the planet have none.
        """
        import pyarrow as pa

        kinds = dict.fromkeys(COLUMNS, pa.float64())
        kinds |= {"photo": pa.string(), "world": pa.string()} | dict.fromkeys(("z", "x", "y"), pa.int32())
        candidate = pa.struct([(name, kinds[name]) for name in _OF_CANDIDATES])
        geometry = {"encoding": "WKB", "geometry_types": ["Point"]}
        system = {} if self.world == "earth" else {"crs": None}
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry | system}}
        return pa.schema(
            [*kinds.items(), ("candidates", pa.list_(candidate)), ("geometry", pa.binary())],
            metadata={"geo": json.dumps(geo), "geoengine": json.dumps({"note": HYPOTHESIS, **self.about})},
        )


def record_of(location: Location) -> dict[str, Any]:
    """Return a result as `json_object` does, less the seconds: a photo located again has the same record."""
    record = json_object(location)
    del record["seconds"]
    return record


def _row(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] if name in record else record["candidates"][0][name] for name in COLUMNS}


def _json_text(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _csv_text(records: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_row, records))
    return text.getvalue()


def _read_tables(parts: Iterable[Path]) -> Iterator[pyarrow.Table]:
    """Yield the rows of files, those of many small ones together: each becomes a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[pyarrow.Table] = []
    for part in parts:
        waiting.append(pq.read_table(part))
        if sum(map(len, waiting)) >= _ROWS_PER_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
