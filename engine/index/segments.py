"""The files of a tile index: sorted tile ids and their embeddings, memory-mapped.

A segment holds tiles of one zoom:
```
0   magic "GEOROWS1", zoom u32, d u32, n u64, m u64, SHA-256 of all that follows the header
64  ids      u64[n]      tiles that have an embedding, increasing
    missing  u64[m]      tiles that the source lacks, increasing
    rows     fp16[n, d]  unit embeddings, in the order of the ids
```
All numbers are little-endian. The id of a tile is its quadkey read as a number to the base 4, so that the
tiles in one tile lie side by side. A file is complete or not there: it gets its name when all of it has
reached the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.index.errors import IndexFileError

_HEADER = struct.Struct("<8sIIQQ32s")
_MAGIC = b"GEOROWS1"
_HASH_CHUNK = 1 << 22

Ids = NDArray[np.uint64]
HalfRows = NDArray[np.float16]

_MASKS = tuple(
    (np.uint64(shift), np.uint64(mask))
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    )
)


def tile_ids(xy: NDArray[np.int64]) -> Ids:
    """Return the id of each tile, uint64[n], from its column and row, int64[n, 2]."""
    return _spread(xy[:, 0]) | _spread(xy[:, 1]) << np.uint64(1)


def tiles_of_ids(ids: Ids) -> NDArray[np.int64]:
    """Return the column and row of each tile, int64[n, 2]; the inverse of `tile_ids`."""
    return np.stack([_gathered(ids), _gathered(ids >> np.uint64(1))], axis=1).astype(np.int64)


def _spread(values: NDArray[np.int64]) -> Ids:
    """Put a zero between any two bits of numbers below 2^32."""
    bits = values.astype(np.uint64)
    for shift, mask in _MASKS:
        bits = (bits | bits << shift) & mask
    return bits


def _gathered(bits: Ids) -> Ids:
    """Take every second bit; the inverse of `_spread`."""
    bits = bits & _MASKS[-1][1]
    for (shift, _), (_, mask) in zip(
        _MASKS[::-1], (*_MASKS[-2::-1], (0, np.uint64(0xFFFFFFFF))), strict=True
    ):
        bits = (bits | bits >> shift) & mask
    return bits


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One open file: `ids` uint64[n], `missing` uint64[m], `rows` fp16[n, d], all read where they lie."""

    path: Path
    zoom: int
    ids: Ids
    missing: Ids
    rows: HalfRows
    sha256: bytes

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Map a file; raises IndexFileError for one that is not whole, OSError for one that is not there."""
        raw = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        if len(raw) < _HEADER.size:
            raise IndexFileError(f"{path}: this is no file of a tile index")
        magic, zoom, width, n, m, digest = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if magic != _MAGIC:
            raise IndexFileError(f"{path}: this is no file of a tile index, or one of another version")
        size = _HEADER.size + 8 * (n + m) + 2 * n * width
        if len(raw) != size:
            raise IndexFileError(f"{path}: damaged: it has {len(raw)} bytes instead of {size}")
        ids, missing, rows = np.split(raw[_HEADER.size :], [8 * n, 8 * (n + m)])
        return cls(
            path, zoom, ids.view("<u8"), missing.view("<u8"), rows.view("<f2").reshape(n, width), digest
        )

    def check(self) -> None:
        """Read the whole file; raises IndexFileError when anything in it cannot be right."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(_HEADER.size)
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
        if digest.digest() != self.sha256:
            raise IndexFileError(f"{self.path}: damaged: its SHA-256 is not the one in its header")
        for ids in (self.ids, self.missing):
            if (ids[1:] <= ids[:-1]).any() or (len(ids) and int(ids[-1]) >> (2 * self.zoom)):
                raise IndexFileError(f"{self.path}: its tiles are not those of zoom {self.zoom}, in order")
        for start in range(0, len(self.rows), 4096):
            lengths = np.linalg.norm(self.rows[start : start + 4096].astype(np.float32), axis=1)
            if not (np.abs(lengths - 1) < 0.01).all():
                raise IndexFileError(f"{self.path}: it has embeddings that are not of length 1")


def write_segment(
    path: Path, zoom: int, ids: Ids, missing: Ids, width: int, rows: Iterable[NDArray[np.floating]]
) -> None:
    """Write a file; `rows` are the embeddings [k, width] in the order of the sorted ids, some at a time.

    On any failure nothing is left behind. Raises IndexFileError when the system refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    digest = hashlib.sha256()
    try:
        with temporary.open("xb") as file:
            file.write(bytes(_HEADER.size))
            written = 0
            for part in (ids.astype("<u8"), missing.astype("<u8")):
                file.write(part.tobytes())
                digest.update(part.tobytes())
            for block in rows:
                data = np.ascontiguousarray(block, dtype="<f2")
                written += len(data)
                file.write(data.data)
                digest.update(data.data)
            assert written == len(ids), "one embedding for each tile"
            file.seek(0)
            file.write(_HEADER.pack(_MAGIC, zoom, width, len(ids), len(missing), digest.digest()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise IndexFileError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def merge_segments(path: Path, segments: list[Segment]) -> None:
    """Write one file with the tiles of several of one zoom; of a tile that several have, the first one's."""
    ids = np.concatenate([segment.ids for segment in segments])
    ids, first = np.unique(ids, return_index=True)
    starts = np.cumsum([0, *(len(segment.ids) for segment in segments)])
    missing = np.setdiff1d(np.concatenate([segment.missing for segment in segments]), ids)
    width = segments[0].rows.shape[1]

    def rows() -> Iterable[HalfRows]:
        for start in range(0, len(first), 16384):
            at = first[start : start + 16384]
            block = np.empty((len(at), width), dtype=np.float16)
            of = np.searchsorted(starts, at, side="right") - 1
            for number in np.unique(of).tolist():
                own = of == number
                block[own] = segments[number].rows[at[own] - starts[number]]
            yield block

    write_segment(path, segments[0].zoom, ids, missing, width, rows())


def find(ids: Ids, wanted: Ids) -> NDArray[np.int64]:
    """Return where each wanted id stands in the sorted `ids`, int64[n]; -1 where it does not."""
    at = np.searchsorted(ids, wanted)
    at[at == len(ids)] = 0
    found = ids[at] == wanted if len(ids) else np.zeros(len(wanted), dtype=bool)
    return np.where(found, at, -1)


def _sync_folder(folder: Path) -> None:
    """Bring a folder's new name to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
