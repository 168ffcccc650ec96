"""What the compiled kernel and its reference share: the checks, and their words."""

from __future__ import annotations

from operator import index
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from geoengine.kernels.int8 import FLOATS, Int8Rows, ready_rows
from geoengine.kernels.tensors import Array, HostTensor, either, matrix, tensor

Answer: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


class Arguments(NamedTuple):
    """Checked arguments, ready for the extension, in its order.

    `embeddings` [n, d] has its values side by side in a row, bfloat16 as its bits in uint16, int8 with
    `scales` [n]; float32 `queries` [m, d] is C-contiguous; 1 <= k; `rows` [r] and `segments` [m + 1] are
    int64; `threads` is None for automatic.
    """

    embeddings: npt.NDArray[Any]
    queries: npt.NDArray[np.float32]
    k: int
    rows: npt.NDArray[np.int64] | None
    segments: npt.NDArray[np.int64] | None
    normalized: bool
    out: Answer | None
    threads: int | None
    scales: npt.NDArray[np.float32] | None
    bfloat16: bool
    scan: Int8Rows | None

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

    def values(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return rows of the embeddings in float64."""
        taken = self.embeddings[numbers]
        if self.bfloat16:
            taken = _widened(taken)
        wide: npt.NDArray[np.float64] = taken.astype(np.float64)
        return wide if self.scales is None else wide * self.scales[numbers, None].astype(np.float64)


def checked(
    embeddings: Array | Int8Rows,
    queries: Array,
    k: int,
    rows: Array | None = None,
    segments: Array | None = None,
    normalized: bool = False,
    out: Answer | None = None,
    threads: int | None = None,
    scan: Int8Rows | None = None,
) -> Arguments:
    """Return the arguments of `cosine_topk` ready for use; copies queries and row numbers where it must."""
    scales = None
    if isinstance(embeddings, Int8Rows):
        table = _host_matrix("embeddings.values", embeddings.values, ("int8",))
        scales = _row_floats("embeddings.scales", embeddings.scales, len(table.array))
    else:
        table = _host_matrix("embeddings", embeddings, FLOATS)
    n, d = table.array.shape
    photos = _host_matrix("queries", queries, FLOATS)
    if photos.array.shape[1] != d:
        raise ValueError(
            f"queries must be [m, {d}] like embeddings of shape {(n, d)}, got shape {photos.array.shape}"
        )
    m = len(photos.array)
    wide = _widened(photos.array) if photos.dtype == "bfloat16" else photos.array
    arguments = Arguments(
        ready_rows("embeddings", table.array),
        np.ascontiguousarray(wide, dtype=np.float32),
        min(at_least_one("k", k), np.iinfo(np.int64).max),
        None if rows is None else _integers("rows", rows),
        None if segments is None else _integers("segments", segments),
        truth("normalized", normalized),
        None,
        None if threads is None else min(at_least_one("threads", threads), max(n, 1)),
        scales,
        table.dtype == "bfloat16",
        None if scan is None else _ready_scan(scan, n, d, scales is not None),
    )
    if arguments.rows is not None:
        _check_rows(arguments.rows, n)
    if arguments.segments is not None:
        _check_segments(arguments.segments, m, arguments.candidates)
    return arguments if out is None else arguments._replace(out=_ready_out(out, m, arguments.kept))


def not_finite(name: str, row: int) -> ValueError:
    """Return the error for a row that holds NaN or infinity, in the compiled kernel's words."""
    return ValueError(f"{name} must be finite, got NaN or infinity in row {row}")


def at_least_one(name: str, value: int) -> int:
    """Return a number of 1 or more; raises TypeError or ValueError, naming it."""
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def truth(name: str, value: bool) -> bool:
    """Return a truth value; raises TypeError, naming it, for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return bool(value)


def _host(name: str, value: object) -> HostTensor:
    found = tensor(name, value)
    if not isinstance(found, HostTensor):
        raise ValueError(f"{name} must be on the CPU like embeddings, got {found.place}")
    return found


def _host_matrix(name: str, value: object, dtypes: tuple[str, ...]) -> HostTensor:
    if isinstance(value, Int8Rows):
        raise TypeError(f"{name} must be {either(dtypes)}, got Int8Rows")
    found = _host(name, value)
    if found.dtype == "int8" and dtypes == FLOATS:
        raise TypeError(f"{name} of int8 need a scale for each row: pass Int8Rows(values, scales)")
    matrix(name, found, dtypes)
    return found


def _row_floats(name: str, value: object, n: int) -> npt.NDArray[np.float32]:
    found = _host(name, value)
    if found.dtype != "float32":
        raise TypeError(f"{name} must be float32, got {found.dtype}")
    if found.array.shape != (n,):
        raise ValueError(f"{name} must have shape {(n,)}, one for each row, got {found.array.shape}")
    return np.ascontiguousarray(found.array)


def _ready_scan(scan: Int8Rows, n: int, d: int, int8: bool) -> Int8Rows:
    if not isinstance(scan, Int8Rows):
        raise TypeError(f"scan must be Int8Rows, got {type(scan).__name__}")
    if int8:
        raise ValueError("scan speeds up embeddings of floats: embeddings are Int8Rows already")
    if scan.errors is None or scan.lengths is None:
        raise ValueError("scan must come from quantize_rows(embeddings): its errors or lengths are missing")
    values = _host_matrix("scan.values", scan.values, ("int8",)).array
    if values.shape != (n, d):
        raise ValueError(f"scan must have the shape of embeddings, {(n, d)}, got {values.shape}")
    floats = (scan.scales, scan.errors, scan.lengths)
    names = ("scan.scales", "scan.errors", "scan.lengths")
    return Int8Rows(
        ready_rows("scan.values", values),
        *(_row_floats(name, value, n) for name, value in zip(names, floats, strict=True)),
    )


def _integers(name: str, value: object) -> npt.NDArray[np.int64]:
    found = _host(name, value)
    if found.dtype not in ("int64", "int32"):
        raise TypeError(f"{name} must be int64 or int32, got {found.dtype}")
    if found.array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {found.array.shape}")
    return np.ascontiguousarray(found.array, dtype=np.int64)


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


def _widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)
