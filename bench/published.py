"""What others have published for the same test sets, from `published.json`; typed there, with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from geoengine.bench.accuracy import THRESHOLDS_KM, Share, wilson_share

_FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published row: of which data set, of how many photos, and for which of the paper's tables.

    `within` are the shares at `THRESHOLDS_KM`; their intervals are ours, from the share and the number of
    photos. `note` says where that number comes from when it was not stated.
    """

    data_set: str
    method: str
    tables: tuple[int, ...]
    photos: int
    percent: tuple[float, ...]
    seconds_per_photo: float | None
    note: str
    source: str

    @property
    def within(self) -> list[Share]:
        """Return the shares as hits, the nearest whole number, with their intervals."""
        return [wilson_share(round(value / 100 * self.photos), self.photos) for value in self.percent]


@lru_cache(maxsize=1)
def published() -> tuple[Published, ...]:
    """Return all published rows."""
    data = json.loads(_FILE.read_text(encoding="utf-8"))
    assert tuple(data["thresholds_km"]) == THRESHOLDS_KM
    return tuple(
        Published(
            data_set=row["data_set"],
            method=row["method"],
            tables=tuple(row["tables"]),
            photos=row["n"],
            percent=tuple(row["within_percent"]),
            seconds_per_photo=row.get("seconds_per_photo"),
            note=row["note"],
            source=row["source"],
        )
        for row in data["rows"]
    )


def of_table(number: int, data_set: str) -> list[Published]:
    """Return what belongs beside a table of ours: rows of the data set, else those of IM2GPS.

    Rows of another data set are shown to compare by eye, and every row says which set it is of.
    """
    rows = [row for row in published() if number in row.tables]
    own = [row for row in rows if row.data_set == data_set]
    return own or [row for row in rows if row.data_set == "im2gps"]
