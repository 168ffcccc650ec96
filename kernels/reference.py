"""What the compiled kernel must answer, in plain NumPy: for tests and for reading, not for speed."""

import numpy as np
import numpy.typing as npt

from geoengine.kernels.arguments import Answer, checked, not_finite
from geoengine.kernels.int8 import Int8Rows
from geoengine.kernels.tensors import Array


def cosine_topk(
    embeddings: Array | Int8Rows,
    queries: Array,
    k: int,
    *,
    rows: Array | None = None,
    segments: Array | None = None,
    normalized: bool = False,
    scan: Int8Rows | None = None,
    out: Answer | None = None,
    threads: int | None = None,
) -> Answer:
    """Return what `geoengine.kernels.cosine_topk` returns, from sums in float64 rounded once to float32.

    Arguments, order, ties and errors are those of the compiled kernel on the CPU; cosines agree to 1e-6, the
    rounding of fp32 sums. `scan` and `threads` are checked and not used. Makes a float64 copy of the
    embeddings.
    """
    call = checked(embeddings, queries, k, rows, segments, normalized, out, threads, scan)
    photo_units = _units(_finite("queries", call.queries, np.arange(len(call.queries))))
    numbers = np.arange(len(call.embeddings)) if call.rows is None else call.rows
    candidates = _finite("embeddings", call.values(numbers), numbers)
    if not call.normalized:
        candidates = _units(candidates)
    shape = (len(photo_units), call.kept)
    scores, indices = call.out or (np.empty(shape, np.float32), np.empty(shape, np.int64))
    scores[:], indices[:] = -np.inf, -1
    for photo, positions, photo_scores, photo_indices in zip(
        photo_units, call.lists, scores, indices, strict=True
    ):
        # A sum per row, not a matrix product: equal rows must get equal scores wherever they stand.
        score = (candidates[positions] * photo).sum(axis=1)
        if not call.normalized:
            score = np.clip(score, -1, 1)
        score = score.astype(np.float32)
        best = np.argsort(-score, kind="stable")[: call.kept]
        photo_indices[: len(best)] = best
        photo_scores[: len(best)] = score[best]
    return scores, indices


def _finite(
    name: str, values: npt.NDArray[np.floating], numbers: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise not_finite(name, int(numbers[bad[0]]))
    return values.astype(np.float64)


def _units(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms = np.sqrt((values * values).sum(axis=1, keepdims=True))
    return np.asarray(np.divide(values, norms, out=np.zeros_like(values), where=norms > 0))
