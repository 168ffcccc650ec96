"""From a row of a table to a photo."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoengine.engine.photo_sets import PhotoEntry, PhotoSetError
from geoengine.engine.photo_sets.columns import Columns, read_place

_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp")  # of files that a table names without one


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReader:
    """Makes entries of one table's rows.

    The files that they name are looked for in `folder`; with `by_key`, those that the ids name too.
    """

    columns: Columns
    table: str
    folder: Path
    by_key: bool
    need_place: bool

    def entry(self, row: int, values: Mapping[str, Any]) -> PhotoEntry:
        """Return the entry of row number `row`; raises PhotoSetError when it names no photo or no place."""
        columns, where = self.columns, f"{self.table}, row {row}"
        data, named = _picture(values.get(columns.file or ""), values.get(columns.data or ""))
        url = _text(values, columns.url)
        if named.startswith(("http://", "https://")):
            named, url = "", url or named
        key = _text(values, columns.key) or named or url or (f"{row:09d}" if data is not None else "")
        if not key:
            raise PhotoSetError(f"{where}: it names no photo")
        wanted = named or (key if self.by_key else "")
        place = None
        if columns.lat is not None and columns.lng is not None:
            place = read_place(values[columns.lat], values[columns.lng], where, need_place=self.need_place)
        return PhotoEntry(
            key=key,
            row=row,
            place=place,
            author=_text(values, columns.author),
            url=url,
            file=self._find(wanted, url) if wanted and data is None else None,
            data=data,
        )

    def _find(self, name: str, url: str) -> Path | None:
        """Return where a file is, or would be; None when it is not there but has an address."""
        wanted = os.path.join(self.folder, name)
        candidates = [f"{wanted}{suffix}" for suffix in _SUFFIXES]
        if "/" in name:
            candidates.append(
                os.path.join(self.folder, name.rpartition("/")[2])
            )  # from folders that are gone
        found = next(filter(os.path.exists, candidates), None)
        return Path(found or wanted) if found or not url else None


def _text(values: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else values[column]
    return "" if value is None else str(value).strip()


def _picture(file: Any, data: Any) -> tuple[bytes | None, str]:  # noqa: ANN401 - any cells
    """Return a picture's bytes, if the table holds them, and its file's name, "" for none."""
    if isinstance(file, dict):  # as Hugging Face's datasets store pictures
        data, file = file.get("bytes"), file.get("path")
    if isinstance(file, bytes):
        data, file = file, None
    return data if isinstance(data, bytes) else None, "" if file is None else str(file).strip()
