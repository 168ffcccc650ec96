"""The checks that the compiled kernel and its reference share: the same calls fail with the same words."""

from operator import index
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32] | npt.NDArray[np.float16]


class Arguments(NamedTuple):
    """Checked arguments, ready for the extension.

    `embeddings` [n, d] and float32 `queries` [m, d] are C-contiguous; 1 <= k; `threads` is 0 for automatic.
    """

    embeddings: Rows
    queries: npt.NDArray[np.float32]
    k: int
    threads: int


def checked(embeddings: Rows, queries: Rows, k: int, threads: int | None) -> Arguments:
    """Return the arguments of `cosine_topk` ready for use; copies only where the extension needs it."""
    rows = _matrix("embeddings", embeddings)
    photos = _matrix("queries", queries)
    if photos.shape[1] != rows.shape[1]:
        raise ValueError(
            f"queries must be [m, {rows.shape[1]}] like embeddings of shape {rows.shape}, "
            f"got shape {photos.shape}"
        )
    kept = min(_at_least_one("k", k), max(rows.shape[0], 1))
    workers = 0 if threads is None else min(_at_least_one("threads", threads), max(rows.shape[0], 1))
    return Arguments(rows, photos.astype(np.float32, copy=False), kept, workers)


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
    if not (array.flags.c_contiguous and array.flags.aligned):
        return array.copy(order="C")
    return array


def _at_least_one(name: str, value: int) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
