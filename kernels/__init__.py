"""Cosine top-k: which rows of a matrix of embeddings are most like each query."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import numpy.typing as npt

try:
    from geoengine.kernels import _topk_cpu
except ImportError as error:
    raise ImportError(
        "geoengine.kernels has no compiled extension for this Python: building it is part of installing, "
        f"so run `pip install .` in the source folder ({error})"
    ) from error

from geoengine.kernels import device
from geoengine.kernels.arguments import Answer, checked
from geoengine.kernels.int8 import Int8Rows, quantize_rows
from geoengine.kernels.tensors import Array, is_on_device

__all__ = ["Int8Rows", "cosine_topk", "kernel_names", "quantize_rows"]


@overload
def cosine_topk(
    embeddings: npt.NDArray[Any],
    queries: npt.NDArray[Any],
    k: int,
    *,
    rows: npt.NDArray[np.int64] | npt.NDArray[np.int32] | None = None,
    segments: npt.NDArray[np.int64] | npt.NDArray[np.int32] | None = None,
    normalized: bool = False,
    scan: Int8Rows | None = None,
    out: Answer | None = None,
    stream: None = None,
    threads: int | None = None,
) -> Answer: ...
@overload
def cosine_topk(
    embeddings: Array | Int8Rows,
    queries: Array,
    k: int,
    *,
    rows: Array | None = None,
    segments: Array | None = None,
    normalized: bool = False,
    scan: Int8Rows | None = None,
    out: tuple[Array, Array] | None = None,
    stream: int | None = None,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
def cosine_topk(
    embeddings: Array | Int8Rows,
    queries: Array,
    k: int,
    *,
    rows: Array | None = None,
    segments: Array | None = None,
    normalized: bool = False,
    scan: Int8Rows | None = None,
    out: Any = None,
    stream: int | None = None,
    threads: int | None = None,
) -> tuple[Any, Any]:
    """Return, for each query, the k rows of `embeddings` with the largest cosine.

    `embeddings` is [n, d] of float32, float16 or bfloat16, or `Int8Rows`; `queries` is [m, d] of float32,
    float16 or bfloat16. Rows may have any length, not only 1. Products are accumulated in float32. Returns
    `scores` float32[m, k'] in [-1, 1] and `indices` int64[m, k'] with k' = min(k, n), best first; equal
    scores are ordered by the lower index. A row or a query of zeros scores 0. With `normalized`, the caller
    vouches that every row has length 1 and its length is not computed: scores are products with the query of
    length 1, as they come out.

    `rows`, int64 or int32 [r], names the rows that are scored, in any order, some of them twice perhaps. With
    `segments`, int64 or int32 [m + 1] rising from 0 to r, query i is scored against its own list alone,
    `rows[segments[i]:segments[i + 1]]`, or against those rows of `embeddings` themselves where `rows` is
    None. Indices are then positions in the query's list, from 0; ties go to the lower position; k' is min(k,
    the length of the longest list), and a shorter list is filled with score -inf and index -1.

    `scan=quantize_rows(embeddings)`, made once and kept, gives the same answer, bit for bit, from half or a
    quarter of the memory traffic: rows are read in int8 first, and in full where the bound on the rounding
    does not rule them out. It must be of these embeddings as they are: rows that it rules out are not read,
    hence not searched for NaN.

    Arrays are NumPy's, or any with `__dlpack__` or `__cuda_array_interface__` (PyTorch, CuPy, ONNX Runtime's
    OrtValue, JAX), all in one place, and embeddings are read where they are, memory-mapped ones too: rows may
    lie apart, but the values of a row must lie side by side. `out` is a tuple of C-contiguous arrays (scores,
    indices) to write to, returned again. The GIL is released: do not change the arrays meanwhile.

    On the CPU the answer is in NumPy arrays. `threads` is the number of threads; None starts more than one
    only when there is enough to do. A score is the same, bit for bit, for any number of threads, any company
    in the call, and any processor.

    On a CUDA device the answer is in arrays there, with `__dlpack__` and `__cuda_array_interface__`. The work
    is put on `stream` (a handle; None is the legacy default stream) and not waited for. `rows` and `segments`
    are int64 there, k' is min(k, r), and what cannot be checked without waiting ranks last: rows with NaN or
    infinity, and row numbers outside [0, n). `scan` and `threads` are for the CPU.

    Raises TypeError for a wrong type; ValueError for a wrong shape, memory layout or place, k or threads
    below 1, segments that descend or end early, and NaN or infinity in a query or in a row that is scored;
    IndexError for row numbers outside [0, n); RuntimeError for CUDA arrays where there are no CUDA kernels.
    Nothing is written to `out` then.
    """
    values: object = embeddings
    scales: object = None
    if isinstance(embeddings, Int8Rows):
        values, scales = embeddings.values, embeddings.scales
    if stream is None:
        answer = _topk_cpu.cosine_topk(
            values, queries, k, rows, segments, normalized, out, threads, scales, False, scan
        )
        if answer is not None:
            return answer
    if stream is not None or is_on_device(values):
        if scan is not None or threads is not None:
            raise ValueError("scan and threads are for embeddings on the CPU")
        return device.cosine_topk(embeddings, queries, k, rows, segments, normalized, out, stream)
    answer = _topk_cpu.cosine_topk(
        *checked(embeddings, queries, k, rows, segments, normalized, out, threads, scan)
    )
    assert answer is not None, "checked arguments are ready"
    return answer


def kernel_names() -> list[str]:
    """Return the instruction sets that this processor can run the kernel with; the first one is used."""
    return _topk_cpu.kernel_names()
