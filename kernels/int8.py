"""Rows of int8 with a scale each: less memory to read, and a quick first look at a table of rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geoengine.kernels import _topk_cpu
from geoengine.kernels.tensors import Array, DeviceTensor, matrix, tensor

FLOATS = ("float32", "float16", "bfloat16")


class Int8Rows(NamedTuple):
    """Rows of int8 and their scales: row i is `scales[i] * values[i]`.

    `values` is int8 [n, d] and `scales` float32 [n], arrays of any library on one device. What
    `quantize_rows` made also knows how far it is from the rows it was made from, which `cosine_topk(scan=)`
    needs: `errors` float32 [n] bounds the length of the difference from above, `lengths` float32 [n] is the
    row's own length.
    """

    values: Array
    scales: Array
    errors: npt.NDArray[np.float32] | None = None
    lengths: npt.NDArray[np.float32] | None = None


def quantize_rows(embeddings: Array) -> Int8Rows:
    """Return the rows of `embeddings` in int8, each scaled by its largest value and rounded to nearest.

    `embeddings` is [n, d], float32, float16 or bfloat16 on the CPU, values side by side in a row. Raises
    TypeError and ValueError as `cosine_topk` does, ValueError for NaN and infinity too.
    """
    found = tensor("embeddings", embeddings)
    shape = matrix("embeddings", found, FLOATS)
    if isinstance(found, DeviceTensor):
        raise ValueError(f"embeddings must be on the CPU to be quantized, got {found.place}")
    values = np.empty(shape, np.int8)
    scales, errors, lengths = np.empty((3, shape[0]), np.float32)
    table = ready_rows("embeddings", found.array)
    _topk_cpu.quantize_rows(table, found.dtype == "bfloat16", values, scales, errors, lengths)
    return Int8Rows(values, scales, errors, lengths)


def ready_rows(name: str, table: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Return the matrix if the compiled kernel can read it where it is; raises ValueError where it cannot."""
    n, d = table.shape
    size = table.itemsize
    side_by_side = n == 0 or d <= 1 or table.strides[1] == size
    row_after_row = n <= 1 or (table.strides[0] >= d * size and table.strides[0] % size == 0)
    if not (side_by_side and row_after_row and table.flags.aligned):
        raise ValueError(
            f"{name} must be aligned, with values side by side in a row and each row after the one "
            f"before, got shape {table.shape} with strides of {table.strides} bytes: they are not copied "
            f"unasked, so pass numpy.ascontiguousarray({name})"
        )
    return table
