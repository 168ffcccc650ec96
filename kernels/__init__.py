"""Cosine top-k: which rows of a matrix of embeddings are most like each query."""

from geoengine.kernels.arguments import Answer, Integers, Rows, checked

try:
    from geoengine.kernels import _topk_cpu
except ImportError as error:
    raise ImportError(
        "geoengine.kernels has no compiled extension for this Python: building it is part of installing, "
        f"so run `pip install .` in the source folder ({error})"
    ) from error

__all__ = ["cosine_topk", "kernel_names"]


def cosine_topk(
    embeddings: Rows,
    queries: Rows,
    k: int,
    *,
    rows: Integers | None = None,
    segments: Integers | None = None,
    normalized: bool = False,
    out: Answer | None = None,
    threads: int | None = None,
) -> Answer:
    """Return, for each query, the k rows of `embeddings` with the largest cosine.

    `embeddings` is [n, d] and `queries` is [m, d], float32 or float16; rows may have any length, not only 1.
    Products are accumulated in float32. Returns `scores` float32[m, k'] in [-1, 1] and `indices` int64[m, k']
    with k' = min(k, n), best first; equal scores are ordered by the lower index. A row or a query of zeros
    scores 0. With `normalized`, the caller vouches that every row has length 1 and its length is not
    computed: scores are products with the query of length 1, as they come out.

    `rows`, int64 or int32 [r], names the rows that are scored, in any order, some of them twice perhaps. With
    `segments`, int64 or int32 [m + 1] rising from 0 to r, query i is scored against its own list alone,
    `rows[segments[i]:segments[i + 1]]`, or against those rows of `embeddings` themselves where `rows` is
    None. Indices are then positions in the query's list, from 0; ties go to the lower position; k' is min(k,
    the length of the longest list), and a shorter list is filled with score -inf and index -1.

    `out` is a tuple of C-contiguous arrays (scores, indices) to write to, returned again.

    `threads` is the number of threads; None starts more than one only when there is enough to do. A score
    is the same, bit for bit, for any number of threads, any company in the call, and any processor.

    Embeddings are read where they are (memory-mapped ones too): rows may lie apart, but the values of a row
    must lie side by side. The GIL is released while it runs: do not change the arrays meanwhile.

    Raises TypeError for a wrong type; ValueError for a wrong shape or memory layout, k or threads below 1,
    segments that descend or end early, and NaN or infinity in a query or in a row that is scored;
    IndexError for row numbers outside [0, n). The arrays of `out` are untouched then.
    """
    answer = _topk_cpu.cosine_topk(embeddings, queries, k, rows, segments, normalized, out, threads)
    if answer is None:
        call = checked(embeddings, queries, k, rows, segments, normalized, out, threads)
        answer = _topk_cpu.cosine_topk(*call)
        assert answer is not None, "checked arguments are ready"
    return answer


def kernel_names() -> list[str]:
    """Return the instruction sets that this processor can run the kernel with; the first one is used."""
    return _topk_cpu.kernel_names()
