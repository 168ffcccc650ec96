"""What the compiled kernel must answer, in plain NumPy: for tests and for reading, not for speed."""

import numpy as np
import numpy.typing as npt

from geoengine.kernels.arguments import Rows, checked, not_finite


def cosine_topk(
    embeddings: Rows, queries: Rows, k: int, *, threads: int | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return what `geoengine.kernels.cosine_topk` returns, from sums in float64 rounded once to float32.

    Arguments, order, ties and errors are those of the compiled kernel; scores agree to 1e-6, the rounding of
    fp32 sums. `threads` is checked and not used. Makes a float64 copy of the embeddings.
    """
    rows, photos, k, _ = checked(embeddings, queries, k, threads)
    photo_units = _unit_rows("queries", photos)
    row_units = _unit_rows("embeddings", rows)
    k = min(k, len(row_units))
    scores = np.empty((len(photo_units), k), np.float32)
    indices = np.empty((len(photo_units), k), np.int64)
    for i, photo in enumerate(photo_units):
        # A sum per row, not a matrix product: equal rows must get equal scores wherever they stand.
        cosine = np.clip((row_units * photo).sum(axis=1), -1, 1).astype(np.float32)
        indices[i] = np.argsort(-cosine, kind="stable")[:k]
        scores[i] = cosine[indices[i]]
    return scores, indices


def _unit_rows(name: str, rows: Rows) -> npt.NDArray[np.float64]:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise not_finite(name, int(bad[0]))
    values = rows.astype(np.float64)
    norms = np.sqrt((values * values).sum(axis=1, keepdims=True))
    return np.asarray(np.divide(values, norms, out=np.zeros_like(values), where=norms > 0))
