"""Rows of half-precision numbers that never change, kept on disk under 63-bit keys, and mapped into memory.

A folder holds parts. A part is two files that only grow: `<part>.keys`, uint64 little-endian, and
`<part>.rows`, float16. Bit 63 of a key marks something that is known not to exist and has no row. Every
writer makes a part of its own, so processes may add at the same time; a part that was cut off, because its
writer was killed or the disk was full, counts as far as both of its files go.
"""

from __future__ import annotations

import errno
import secrets
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from geoengine.training.errors import TrainingError

_ABSENT = np.uint64(1 << 63)

Keys = npt.NDArray[np.uint64]
Half = npt.NDArray[np.float16]


class RowStore:
    """The rows in a folder, float16[n, *shape], by key."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self._folder, self._shape = folder, shape
        self._parts: list[Half] = []
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self.refresh()

    @property
    def row_bytes(self) -> int:
        """The size of a row on disk, its key included."""
        return 2 * int(np.prod(self._shape)) + 8

    def refresh(self) -> None:
        """Look at what is in the folder now."""
        keys, parts, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        self._parts = []
        for file in sorted(self._folder.glob("*.keys")):
            own = np.fromfile(file, dtype="<u8", count=file.stat().st_size // 8)
            there = (own & _ABSENT) == 0
            stored = _stored(file.with_suffix(".rows"), self._shape)
            row = np.where(there, np.cumsum(there) - 1, -1)
            own, row = own[row < len(stored)], row[row < len(stored)]
            keys.append(own & ~_ABSENT)
            parts.append(np.full(len(own), len(self._parts), np.int32))
            rows.append(row)
            self._parts.append(stored)
        joined = np.concatenate(keys)
        # Stable, so that of a key that two writers added the first part's row counts, on every machine.
        order = np.argsort(joined, kind="stable")
        self._keys = joined[order]
        self._part, self._row = np.concatenate(parts)[order], np.concatenate(rows)[order]

    def known(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Tell which keys have a row, or are known to have none; bool[n]."""
        return self._find(keys) >= 0

    def present(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Tell which keys have a row; bool[n]."""
        place = self._find(keys)
        present = place >= 0
        present[present] = self._row[place[present]] >= 0
        return present

    def get(self, keys: Keys) -> Half:
        """Return the rows of keys that are all present, float16[n, *shape]."""
        place = self._find(keys)
        part, row = self._part[place], self._row[place]
        if len(place) and (place.min() < 0 or row.min() < 0):
            raise KeyError("a key has no row")
        rows = np.empty((len(keys), *self._shape), np.float16)
        for number in np.unique(part):
            chosen = part == number
            rows[chosen] = self._parts[number][row[chosen]]
        return rows

    def add(self, keys: Keys, rows: Half, absent: Keys) -> None:
        """Add rows, float16[n, *shape], under new keys, and keys that have none; `refresh` shows them.

        Raises TrainingError when there is no room, or the folder cannot be written.
        """
        try:
            key_file, row_file = self._writer()
            row_file.write(np.ascontiguousarray(rows, dtype="<f2").tobytes())
            row_file.flush()
            key_file.write(np.concatenate([keys, absent | _ABSENT]).astype("<u8").tobytes())
            key_file.flush()
        except OSError as error:
            raise disk_error(self._folder, error) from None

    def close(self) -> None:
        """Finish the part that was written."""
        files, self._files = self._files, None
        for file in files or ():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, keys: Keys) -> npt.NDArray[np.int64]:
        place = np.searchsorted(self._keys, keys)
        place[place == len(self._keys)] = 0
        if not len(self._keys):
            return np.full(len(keys), -1, np.int64)
        return np.where(self._keys[place] == keys, place, -1)

    def _writer(self) -> tuple[BinaryIO, BinaryIO]:
        if self._files is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            part = self._folder / f"part-{len(self._parts):04d}-{secrets.token_hex(4)}"
            self._files = part.with_suffix(".keys").open("xb"), part.with_suffix(".rows").open("xb")
        return self._files


def _stored(file: Path, shape: tuple[int, ...]) -> Half:
    """Map the whole rows of a file; a file of none, or a missing one, has none."""
    count = file.stat().st_size // (2 * int(np.prod(shape))) if file.exists() else 0
    if not count:
        return np.empty((0, *shape), np.float16)
    return np.memmap(file, dtype="<f2", mode="r", shape=(count, *shape))


def disk_error(where: Path, error: OSError) -> TrainingError:
    """Return the error that says that a file or folder could not be written, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrainingError(
            f"{where}: the disk is full; make room and give the same command again, "
            "or name another folder for the activations with --cache, or leave them out with --no-cache"
        )
    return TrainingError(f"{where}: cannot be written ({error.strerror or error})")
