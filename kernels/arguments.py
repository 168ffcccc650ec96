"""What the compiled kernel and its reference share: the checks, and their words."""

from operator import index
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32] | npt.NDArray[np.float16]
Integers = npt.NDArray[np.int64] | npt.NDArray[np.int32]
Answer = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


class Arguments(NamedTuple):
    """Checked arguments, ready for the extension.

    `embeddings` [n, d] with values side by side in a row, and C-contiguous float32 `queries` [m, d]; 1 <= k;
    int64 `rows` [r] and `segments` [m + 1]; `threads` is None for automatic.
    """

    embeddings: Rows
    queries: npt.NDArray[np.float32]
    k: int
    rows: npt.NDArray[np.int64] | None
    segments: npt.NDArray[np.int64] | None
    normalized: bool
    out: Answer | None
    threads: int | None

    @property
    def lists(self) -> list[slice]:
        """The positions of each query's list among the candidates."""
        if self.segments is None:
            return [slice(0, self.candidates)] * len(self.queries)
        return [slice(*ends) for ends in zip(self.segments[:-1], self.segments[1:], strict=True)]

    @property
    def candidates(self) -> int:
        """The number of candidates in all lists together."""
        return len(self.embeddings if self.rows is None else self.rows)

    @property
    def kept(self) -> int:
        """The width of the answer: k, or the length of the longest list where that is less."""
        if self.segments is None:
            return min(self.k, self.candidates)
        return min(self.k, int(np.diff(self.segments).max(initial=0)))


def checked(
    embeddings: Rows,
    queries: Rows,
    k: int,
    rows: Integers | None = None,
    segments: Integers | None = None,
    normalized: bool = False,
    out: Answer | None = None,
    threads: int | None = None,
) -> Arguments:
    """Return the arguments of `cosine_topk` ready for use; copies queries and row numbers where it must."""
    table = _matrix("embeddings", embeddings)
    photos = _matrix("queries", queries)
    if photos.shape[1] != table.shape[1]:
        raise ValueError(
            f"queries must be [m, {table.shape[1]}] like embeddings of shape {table.shape}, "
            f"got shape {photos.shape}"
        )
    if not isinstance(normalized, bool | np.bool_):
        raise TypeError(f"normalized must be True or False, got {type(normalized).__name__}")
    arguments = Arguments(
        _ready_rows(table),
        np.ascontiguousarray(photos, dtype=np.float32),
        min(_at_least_one("k", k), np.iinfo(np.int64).max),
        None if rows is None else _integers("rows", rows),
        None if segments is None else _integers("segments", segments),
        bool(normalized),
        None,
        None if threads is None else min(_at_least_one("threads", threads), max(len(table), 1)),
    )
    if arguments.rows is not None:
        _check_rows(arguments.rows, len(table))
    if arguments.segments is not None:
        _check_segments(arguments.segments, len(photos), arguments.candidates)
    return arguments if out is None else arguments._replace(out=_ready_out(out, len(photos), arguments.kept))


def not_finite(name: str, row: int) -> ValueError:
    """Return the error for a row that holds NaN or infinity, in the compiled kernel's words."""
    return ValueError(f"{name} must be finite, got NaN or infinity in row {row}")


def _matrix(name: str, array: Rows) -> Rows:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != np.float32 and array.dtype != np.float16:
        raise TypeError(f"{name} must be float32 or float16, got {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have two dimensions (rows, d), got shape {array.shape}")
    return array


def _ready_rows(table: Rows) -> Rows:
    n, d = table.shape
    size = table.itemsize
    side_by_side = n == 0 or d <= 1 or table.strides[1] == size
    row_after_row = n <= 1 or (table.strides[0] >= d * size and table.strides[0] % size == 0)
    if not (side_by_side and row_after_row and table.flags.aligned):
        raise ValueError(
            "embeddings must be aligned, with values side by side in a row and each row after the one "
            f"before, got shape {table.shape} with strides of {table.strides} bytes: they are not copied "
            "unasked, so pass numpy.ascontiguousarray(embeddings)"
        )
    return table


def _integers(name: str, array: Integers) -> npt.NDArray[np.int64]:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != np.int64 and array.dtype != np.int32:
        raise TypeError(f"{name} must be int64 or int32, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _check_rows(rows: npt.NDArray[np.int64], n: int) -> None:
    outside = np.flatnonzero((rows < 0) | (rows >= n))
    if outside.size:
        position = int(outside[0])
        raise IndexError(
            f"rows must be row numbers of embeddings, in [0, {n}), "
            f"got {rows[position]} at position {position}"
        )


def _check_segments(segments: npt.NDArray[np.int64], m: int, count: int) -> None:
    if len(segments) != m + 1:
        raise ValueError(f"segments must hold m + 1 = {m + 1} positions, got {len(segments)}")
    if segments[0] != 0 or segments[-1] != count:
        raise ValueError(
            f"segments must run from 0 to {count}, the number of candidates, "
            f"got {segments[0]} to {segments[-1]}"
        )
    falls = np.flatnonzero(np.diff(segments) < 0)
    if falls.size:
        at = int(falls[0])
        raise ValueError(
            f"segments must not descend, got {segments[at]} and then {segments[at + 1]} at position {at + 1}"
        )


def _ready_out(out: Answer, m: int, k: int) -> Answer:
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"out must be a tuple (scores, indices), got {type(out).__name__}")
    for name, array, dtype in zip(("scores", "indices"), out, (np.float32, np.int64), strict=True):
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"out {name} must be a NumPy array of {np.dtype(dtype)}, got {got}")
        if array.shape != (m, k):
            raise ValueError(f"out {name} must have shape {(m, k)}, got {array.shape}")
        if not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable):
            raise ValueError(f"out {name} must be C-contiguous, aligned and writeable")
    return out


def _at_least_one(name: str, value: int) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
