"""The per-photo results of an evaluation, kept as they come so that a killed run goes on where it was.

```
photos.csv   a row for each photo and setting; the columns are those of `columns`
job.json     what the rows are results of; rows of another job are refused
lock         held by the process that evaluates
```
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from geoengine.engine.errors import GeoEngineError
from geoengine.engine.render.files import OutputError, locked, write_atomically
from geoengine.engine.tiles import LngLat

SCHEMA = 1
JOB, ROWS, LOCK = "job.json", "photos.csv", "lock"

_SETTING = ("method", "score", "k")
_NUMBERS = ("error_km", "radius_km", "scored", "wanted", "tiles", "seconds")


class ResultsError(GeoEngineError):
    """A folder of results is of another job, in use, or damaged."""


class Setting(NamedTuple):
    """What the rows of one job may differ in: how the search ranks and answers, and its beam width.

    `k` is 0 where there is no beam.
    """

    method: str
    score: str
    k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoRow:
    """What one search gave for one photo.

    `place` is the answer, None when the photo could not be read; `problem` then says why. `error_km` is the
    great-circle distance. `ranks` maps the zoom of each level that was searched to the place of the true tile
    in its beam, from 1, and to 0 when it was not there. Of the tiles `wanted` on all levels, `scored` had a
    picture in time. `tiles` and `seconds` are the photo's part of the tiles read and of the time taken by the
    photos that were located together. `radii_km` maps shares to the radius within which that share of the
    probability is stated to lie; they and `radius_km` are
    `calibrated` when they were fitted for such searches.
    """

    photo: str
    setting: Setting
    true: LngLat
    place: LngLat | None = None
    error_km: float = float("inf")
    radius_km: float = float("nan")
    radii_km: Mapping[float, float]
    calibrated: bool = False
    ranks: Mapping[int, int]
    scored: int = 0
    wanted: int = 0
    tiles: float = 0.0
    seconds: float = 0.0
    problem: str = ""


def columns(zooms: Sequence[int], shares: Sequence[float]) -> list[str]:
    """Return the names of the columns: `rank_z4` … are empty for levels that were not searched."""
    return [
        *("photo", *_SETTING, "true_lat", "true_lng", "lat", "lng"),
        *(*_NUMBERS, "calibrated"),
        *(f"rank_z{zoom}" for zoom in zooms),
        *(f"radius_{share:g}" for share in shares),
        "problem",
    ]


class Results:
    """The rows of one job, in memory and, given a folder, on disk as well.

    `job` is what the rows depend on, JSON-ready, one level deep; `zooms` are its levels. Opening a folder
    takes its lock; a context manager gives it back.
    """

    def __init__(self, job: Mapping[str, Any], zooms: Sequence[int], shares: Sequence[float]) -> None:
        self.job, self.zooms, self.shares = dict(job), tuple(zooms), tuple(shares)
        self._rows: dict[tuple[Setting, str], PhotoRow] = {}
        self._file: io.FileIO | None = None
        self._undo = contextlib.ExitStack()

    @classmethod
    def open(
        cls,
        folder: Path,
        job: Mapping[str, Any],
        zooms: Sequence[int],
        shares: Sequence[float],
        *,
        again: bool = False,
    ) -> Self:
        """Open or begin the results in a folder, with the rows that are there; `again` throws them away.

        A half-written last row is dropped, and so are photos that could not be read, which are tried again.
        Raises ResultsError for rows of another job, and when another process has the folder; OutputError when
        it cannot be written.
        """
        results = cls(job, zooms, shares)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            busy = f"{folder}: another process evaluates into it; wait for it, or give another --out"
            results._undo.enter_context(locked(folder / LOCK, busy, ResultsError))
            results._begin(folder, again)
        except OSError as error:
            results.close()
            raise OutputError(f"{folder}: cannot be written ({error.strerror or error})") from None
        except BaseException:
            results.close()
            raise
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder back."""
        self._undo.close()
        self._file = None

    def row(self, setting: Setting, photo: str) -> PhotoRow | None:
        """Return the row of a photo, None when there is none yet."""
        return self._rows.get((setting, photo))

    def add(self, rows: Iterable[PhotoRow]) -> None:
        """Add rows, and see to it that they are on disk; raises OutputError."""
        new = list(rows)
        if self._file is not None:
            try:
                self._write(new)
            except OSError as error:
                raise OutputError(
                    f"{self._file.name}: cannot be written ({error.strerror or error}); the rows before are "
                    "kept, and the same command goes on"
                ) from None
        self._rows.update({(row.setting, row.photo): row for row in new})

    def __iter__(self) -> Iterator[PhotoRow]:
        return iter(self._rows.values())

    def _begin(self, folder: Path, again: bool) -> None:
        path, job = folder / ROWS, json.loads(json.dumps({"schema": SCHEMA, **self.job}))
        if again or not (folder / JOB).exists():
            if path.exists() and not again:
                raise ResultsError(f"{path}: rows without their {JOB}: give another --out, or --again")
            path.unlink(missing_ok=True)
            write_atomically(folder / JOB, json.dumps(job, indent=2) + "\n")
        else:
            _check_same(folder, job)
        if path.exists():
            self._read(path)
        # Written again, so that a torn last row and photos to be tried again are gone.
        write_atomically(path, _csv([columns(self.zooms, self.shares), *map(self._cells, self)]))
        # Unbuffered: after a full disk nothing is left that closing the file would try to write.
        self._file = self._undo.enter_context(io.FileIO(path, "ab"))

    def _write(self, rows: Iterable[PhotoRow]) -> None:
        assert self._file is not None
        text = memoryview(_csv(map(self._cells, rows)).encode())
        while text:
            text = text[self._file.write(text) :]
        os.fsync(self._file.fileno())

    def _read(self, path: Path) -> None:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1].decode("utf-8", errors="replace")
        lines = csv.DictReader(io.StringIO(whole, newline=""))
        if whole and lines.fieldnames != columns(self.zooms, self.shares):
            raise ResultsError(f"{path}: not the columns of this version: give another --out, or --again")
        for cells in lines:
            try:
                row = self._row(cells)
            except (KeyError, TypeError, ValueError):
                raise ResultsError(
                    f"{path}: line {lines.line_num} is damaged: delete it, and the photo is located again"
                ) from None
            if not row.problem:
                self._rows[row.setting, row.photo] = row

    def _cells(self, row: PhotoRow) -> list[object]:
        place = ("", "") if row.place is None else (row.place.lat, row.place.lng)
        numbers = ("" if row.problem else getattr(row, name) for name in _NUMBERS)
        return [
            *(row.photo, *row.setting, row.true.lat, row.true.lng, *place),
            *numbers,
            "" if row.problem else int(row.calibrated),
            *(row.ranks.get(zoom, "") for zoom in self.zooms),
            *(row.radii_km.get(share, "") for share in self.shares),
            row.problem,
        ]

    def _row(self, cells: dict[str, str]) -> PhotoRow:
        setting = Setting(cells["method"], cells["score"], int(cells["k"]))
        true = LngLat(float(cells["true_lng"]), float(cells["true_lat"]))
        if cells["problem"]:
            return PhotoRow(
                photo=cells["photo"],
                setting=setting,
                true=true,
                ranks={},
                radii_km={},
                problem=cells["problem"],
            )
        return PhotoRow(
            photo=cells["photo"],
            setting=setting,
            true=true,
            place=LngLat(float(cells["lng"]), float(cells["lat"])),
            error_km=float(cells["error_km"]),
            calibrated=bool(int(cells["calibrated"])),
            radius_km=float(cells["radius_km"]),
            scored=int(cells["scored"]),
            wanted=int(cells["wanted"]),
            tiles=float(cells["tiles"]),
            seconds=float(cells["seconds"]),
            ranks={zoom: int(cells[f"rank_z{zoom}"]) for zoom in self.zooms if cells[f"rank_z{zoom}"]},
            radii_km={s: float(cells[f"radius_{s:g}"]) for s in self.shares if cells[f"radius_{s:g}"]},
        )


def _check_same(folder: Path, job: Mapping[str, Any]) -> None:
    """Raise ResultsError when the folder's rows are of another job, naming the first thing that differs."""
    path = folder / JOB
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ResultsError(f"{path}: cannot be read: give another --out, or --again to start anew") from None
    if not isinstance(there, dict):
        raise ResultsError(f"{path}: is not a job of geoengine: give another --out, or --again")
    for name in (*job, *there):
        if there.get(name) != job.get(name):
            raise ResultsError(
                f"{folder} holds results of another job: its {name.replace('_', ' ')} is "
                f"{_short(there.get(name))}, now {_short(job.get(name))}; give another --out, or --again"
            )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = text or "none"
    return text if len(text) <= 60 else f"{text[:57]}…"


def _csv(lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
