"""Which candidates of a level stay: the best, few of one parent, and one that joins in any case."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def select(
    scores: NDArray[np.floating],
    k: int,
    *,
    groups: NDArray[np.int64] | None = None,
    quota: int | None = None,
    joined: int | None = None,
) -> NDArray[np.int64]:
    """Return the places of the k best of `scores` [n], best first; of equal ones, the earlier.

    With a `quota`, candidates that have so many better ones in their group, int64[n], stay only where the
    others are too few to make k. The candidate at place `joined` stays too, at its rank: then there may be
    k + 1.
    """
    order = np.argsort(-scores, kind="stable")
    kept = order[:k] if quota is None or groups is None else _within_quota(order, groups[order], k, quota)
    if joined is not None and joined not in kept:
        kept = order[np.isin(order, np.append(kept, joined))]
    return np.asarray(kept, dtype=np.int64)


def _within_quota(
    order: NDArray[np.int64], groups: NDArray[np.int64], k: int, quota: int
) -> NDArray[np.int64]:
    """Return k of the ranked candidates, in their order, preferring the first `quota` of each group."""
    by_group = np.argsort(groups, kind="stable")  # within a group, the better first
    sizes = np.bincount(groups)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.empty(len(order), dtype=np.int64)  # of each ranked candidate within its group, from 0
    place[by_group] = np.arange(len(order)) - first
    preferred = np.argsort(place >= quota, kind="stable")  # those within the quota first
    return order[np.sort(preferred[:k])]
