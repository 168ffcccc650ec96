"""Cosine top-k: which rows of a matrix of embeddings are most like each query."""

import numpy as np
import numpy.typing as npt

from geoengine.kernels.arguments import Rows, checked

try:
    from geoengine.kernels import _topk_cpu
except ImportError as error:
    raise ImportError(
        "geoengine.kernels has no compiled extension for this Python: building it is part of installing, "
        f"so run `pip install .` in the source folder ({error})"
    ) from error

__all__ = ["cosine_topk", "kernel_names"]


def cosine_topk(
    embeddings: Rows, queries: Rows, k: int, *, threads: int | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return, for each query, the k rows of `embeddings` with the largest cosine.

    `embeddings` is [n, d] and `queries` is [m, d], float32 or float16; rows may have any length, not only 1.
    Products are accumulated in float32. Returns `scores` float32[m, k'] in [-1, 1] and `indices` int64[m, k']
    with k' = min(k, n), best first; equal scores are ordered by the lower index. A row or a query of zeros
    scores 0.

    `threads` is the number of threads; None starts more than one only when there is enough to do. The answer
    is the same, bit for bit, for any number of threads, any other queries in the call, and any processor.

    C-contiguous embeddings are read where they are (memory-mapped ones too); anything else is copied first.
    The GIL is released while it runs: do not change the arrays meanwhile.

    Raises TypeError for anything but float32 or float16 arrays, and ValueError for a wrong number of
    dimensions, widths that differ, k or threads below 1, and rows with NaN or infinity, which have no
    direction.
    """
    arguments = checked(embeddings, queries, k, threads)
    return _topk_cpu.cosine_topk(
        arguments.embeddings, arguments.queries, arguments.k, threads=arguments.threads, kernel=None
    )


def kernel_names() -> list[str]:
    """Return the instruction sets that this processor can run the kernel with; the first one is used."""
    return _topk_cpu.kernel_names()
