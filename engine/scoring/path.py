"""The path score: log-probabilities that add up from the first level down to a tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.calibration import Among, LevelFit

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The candidates of one photo at one level, in their order, and what was found out about them.

    `parents` say which candidates have the same parent: its place in the beam before, or among all tiles of
    the level before plus 1; 0 where there is none. In a `whole` level all tiles are candidates. `evidence`
    holds log-probabilities by name.
    """

    photo: int
    zoom: int
    xy: NDArray[np.int64]  # (n, 2)
    parents: NDArray[np.int64]  # (n,)
    whole: bool
    cosines: NDArray[np.float32]  # (n,)
    evidence: Mapping[str, NDArray[np.float32]]  # (n,) each


def path_scores(
    scored: Scored, before: Floats | float, fit: LevelFit, weights: Mapping[str, float]
) -> Floats:
    """Return the path scores of candidates, float64[n]: natural logarithms of probabilities that sum to 1.

    `before` are the scores of what contains them, one for each candidate or one for all. With `weights` of
    the evidence by name, a score is, up to what makes the probabilities sum to 1,
    gamma S(parent) + w log softmax(cos / tau) + sum_e lambda_e log softmax(log p_e).
    The softmax of cosines is over all candidates, or over those of one parent, as the fit says; that of the
    evidence always over those of one parent, since it is one distribution seen at several zooms.
    """
    logits = fit.scale * scored.cosines.astype(np.float64)
    if fit.among is Among.siblings:
        logits = log_softmax(logits, scored.parents * (not scored.whole))
    scores = fit.inherited * before + fit.weight * logits
    for name, values in scored.evidence.items():
        scores = scores + weights[name] * log_softmax(values.astype(np.float64), scored.parents)
    return log_softmax(scores, np.zeros(len(scores), dtype=np.int64))


def log_softmax(logits: Floats, groups: NDArray[np.int64]) -> Floats:
    """Return the log softmax of float64[n] within each group, given as int64[n] from 0."""
    if not len(logits):
        return logits
    count = int(groups.max()) + 1
    top = np.full(count, -np.inf)
    np.maximum.at(top, groups, logits)
    shifted = logits - top[groups]
    total = np.bincount(groups, np.exp(shifted), count)
    return np.asarray(shifted - np.log(np.where(total > 0, total, 1.0))[groups], dtype=np.float64)


def centred_cosines(
    cosines: NDArray[np.float32],
    query: NDArray[np.float32],
    to_mean: NDArray[np.float32],
    mean: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the cosines of a query with rows from which their mean was subtracted, without the rows.

    For a unit query q and unit rows e this is q (e - mu) / |e - mu| with |e - mu|^2 = 1 - 2 e mu + |mu|^2.
    `cosines`, float32[n], are q e, `to_mean` e mu.
    """
    unit = query.astype(np.float64) / max(float(np.linalg.norm(query)), 1e-12)
    centre = mean.astype(np.float64)
    squared = 1.0 - 2.0 * to_mean.astype(np.float64) + centre @ centre
    # A tile that equals the mean has no direction: it is like nothing, as a row of zeros is.
    length = np.sqrt(np.maximum(squared, 1e-6))
    return np.asarray((cosines - unit @ centre) / length, dtype=np.float32)
