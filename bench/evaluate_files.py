"""The files that an evaluation leaves beside its rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geoengine.bench.evaluate_report import Report
from geoengine.bench.evaluate_rows import PhotoRow
from geoengine.bench.evaluate_tables import markdown
from geoengine.engine.render.files import OutputError, write_atomically

REPORT, TABLES, UNREADABLE, PARQUET = "report.json", "tables.md", "unreadable.csv", "photos.parquet"


def write_files(report: Report, folder: Path, plots: Sequence[str], *, parquet: bool = False) -> None:
    """Write the report, the tables, the photos that could not be read, and the plots in the formats given.

    With `parquet`, also the rows as Parquet, which needs the extra of that name. Raises OutputError.
    """
    write_atomically(folder / REPORT, json.dumps(report.to_dict(), indent=2) + "\n")
    write_atomically(folder / TABLES, markdown(report))
    unreadable = folder / UNREADABLE
    if report.problems:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("photo", "problem"), *report.problems.items()])
        write_atomically(unreadable, text.getvalue())
    else:
        unreadable.unlink(missing_ok=True)  # of a run before, when they could not be read
    if parquet:
        write_parquet(report.rows, folder / PARQUET)
    if plots:
        from geoengine.bench.evaluate_plots import write_plots

        write_plots(report, folder, plots)


def write_parquet(rows: Sequence[PhotoRow], path: Path) -> None:
    """Write rows as a Parquet file with the columns of the CSV file; raises OutputError."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    zooms = sorted({zoom for row in rows for zoom in row.ranks})
    shares = sorted({share for row in rows for share in row.radii_km})
    read = [not row.problem for row in rows]

    def column(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([value if there else None for value, there in zip(values, read, strict=True)], kind)

    places = [row.place or row.true for row in rows]  # those of unreadable photos are left out
    columns = {
        "photo": pa.array([row.photo for row in rows]),
        "method": pa.array([row.setting.method for row in rows]),
        "score": pa.array([row.setting.score for row in rows]),
        "k": pa.array([row.setting.k for row in rows], pa.int32()),
        "true_lat": pa.array([row.true.lat for row in rows]),
        "true_lng": pa.array([row.true.lng for row in rows]),
        "lat": column([place.lat for place in places], pa.float64()),
        "lng": column([place.lng for place in places], pa.float64()),
        **{
            name: column([getattr(row, name) for row in rows], pa.float64())
            for name in ("error_km", "radius_km", "tiles", "seconds")
        },
        **{name: column([getattr(row, name) for row in rows], pa.int64()) for name in ("scored", "wanted")},
        "calibrated": column([row.calibrated for row in rows], pa.bool_()),
        **{f"rank_z{zoom}": pa.array([row.ranks.get(zoom) for row in rows], pa.int32()) for zoom in zooms},
        **{f"radius_{s:g}": pa.array([row.radii_km.get(s) for row in rows], pa.float64()) for s in shares},
        "problem": pa.array([row.problem or None for row in rows], pa.string()),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(pa.table(columns), temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)
