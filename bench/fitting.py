"""Fitting the numbers of a calibration to what searches of known photos saw; plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.calibration import STATED_SHARES, Among, LevelFit, RadiusFit
from geoengine.engine.results import Level
from geoengine.engine.scoring.mass import Mass, softmax_shares
from geoengine.engine.scoring.path import log_softmax
from geoengine.engine.tiles import LngLat, center, great_circle_km, tile_at

Floats = NDArray[np.float64]
Example = tuple[Floats, int]
"""Features of some candidates, float64[n, m], and the place of the true one."""

_WEIGHT_PULL = (
    1e-2  # towards the start, per squared unit: keeps a weight that the data leave open where it is
)
_SCALE_PULL = 1e-5  # scales are about 50 times larger than weights
_STEPS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One photo's candidates at one level: what their scores are made of, and which is the true one.

    `above` are the places of their parents among the candidates of the level before, -1 at the first.
    """

    zoom: int
    cosines: Floats  # (n,)
    parents: NDArray[np.int64]  # (n,)
    above: NDArray[np.int64]  # (n,)
    evidence: Mapping[str, Floats]  # (n,) each
    truth: int


def conditional_logit(examples: Sequence[Example], start: Floats, pull: Floats) -> tuple[Floats, float]:
    """Return the weights [m] that make the true candidates likeliest, none below 0, and the mean loss.

    The loss is the mean of -log softmax(features @ weights) at the true candidate; `pull` [m] times half the
    squared distance from `start` is added, so that there always is one answer. Newton's method.
    """
    if not examples:
        return start, 0.0
    weights = start.astype(np.float64)
    loss = _loss(examples, weights) + _penalty(weights, start, pull)
    for _ in range(_STEPS):
        gradient, curvature = _derivatives(examples, weights)
        gradient += pull * (weights - start)
        free = (weights > 0) | (gradient < 0)  # the others stay at 0
        step = np.zeros_like(weights)
        inner = curvature[np.ix_(free, free)] + np.diag(pull[free])
        step[free] = np.linalg.solve(inner, gradient[free])
        for halving in range(30):
            moved = np.maximum(weights - step / 2**halving, 0.0)
            better = _loss(examples, moved) + _penalty(moved, start, pull)
            if better < loss:
                break
        if not better < loss - 1e-10:
            break
        weights, loss = moved, better
    return weights, _loss(examples, weights)


def fit_levels(photos: Sequence[Sequence[Seen]], start: Mapping[int, float]) -> dict[int, LevelFit]:
    """Return the fits of all levels, from what each photo's search saw, coarse to fine.

    `start` has the scale of each zoom that is kept where the photos do not tell. Both kinds of softmax are
    tried, and the one under which the true tiles are likelier over all levels is taken.
    """
    tried = [_fit_levels(photos, start, among) for among in Among]
    return min(tried, key=lambda fits_and_loss: fits_and_loss[1])[0]


def level_losses(photos: Sequence[Sequence[Seen]], fits: Mapping[int, LevelFit]) -> dict[int, float]:
    """Return each level's mean of -log of the probability that a calibration gives the true tile."""
    losses: dict[int, list[float]] = {}
    for photo in photos:
        scores: Floats = np.zeros(0)
        for seen in photo:
            scores = _scores(seen, scores, fits[seen.zoom])
            losses.setdefault(seen.zoom, []).append(-float(scores[seen.truth]))
    return {zoom: float(np.mean(values)) for zoom, values in sorted(losses.items())}


def fit_radius(
    found: Sequence[tuple[Level, ...]], places: Sequence[LngLat], k: int, scale: float
) -> RadiusFit:
    """Return how last beams become radii, from the searches of photos taken at `places`.

    The sharpness, around `scale`, is the likeliest for the true tiles that are in their beam; `elsewhere` is
    the share of those that are not, by the rule of succession. Then the radii are made to hold the truth as
    often as they say: the modelled share for a stated share s is the smallest within which the truth lay for
    s of the photos, the ceil((n + 1) s)-th of n (split conformal prediction: V. Vovk et al., Algorithmic
    Learning in a Random World, 2005, chapter 4).
    """
    beams = []
    for levels, place in zip(found, places, strict=True):
        beam = [scored.tile for scored in levels[-1].beam]
        true = tile_at(place, levels[-1].zoom)
        beams.append((levels[-1], beam.index(true) if true in beam else None))
    inside = [(last, at) for last, at in beams if at is not None]
    elsewhere = (len(beams) - len(inside) + 1) / (len(beams) + 2)

    def loss(log_sharpness: float) -> float:
        return -sum(
            math.log(max(softmax_shares(last, math.exp(log_sharpness))[at], 1e-300)) for last, at in inside
        )

    sharpness = math.exp(_minimum(loss, math.log(scale) - 3, math.log(scale) + 3))
    modelled = sorted(
        _share_at(place, last, sharpness, elsewhere) for (last, _), place in zip(beams, places, strict=True)
    )
    ranks = [math.ceil((len(modelled) + 1) * share - 1e-9) for share in STATED_SHARES]
    shares = tuple(modelled[rank - 1] if rank <= len(modelled) else 1.0 for rank in ranks)
    return RadiusFit(k=k, sharpness=sharpness, elsewhere=elsewhere, shares=shares)


def _share_at(place: LngLat, last: Level, sharpness: float, elsewhere: float) -> float:
    """Return the modelled share within the distance of a place from the answer."""
    point = center(last.beam[0].tile)
    mass = Mass.around(point, last, softmax_shares(last, sharpness), elsewhere=elsewhere)
    return mass.share(great_circle_km(point, place))


def _fit_levels(
    photos: Sequence[Sequence[Seen]], start: Mapping[int, float], among: Among
) -> tuple[dict[int, LevelFit], float]:
    """Return the fits with one kind of softmax, level after level, and the sum of the levels' losses."""
    fits: dict[int, LevelFit] = {}
    before: list[Floats] = [np.zeros(0) for _ in photos]
    total = 0.0
    for depth, zoom in enumerate(sorted(start)):
        there = [(row, photo[depth]) for row, photo in enumerate(photos) if len(photo) > depth]
        if not there:
            fits[zoom] = LevelFit(scale=start[zoom], among=among)
            continue
        level, scores = [seen for _, seen in there], [before[row] for row, _ in there]
        fits[zoom] = _fit_level(level, scores, start[zoom], among)
        losses = []
        for row, seen in there:
            before[row] = _scores(seen, before[row], fits[zoom])
            losses.append(-before[row][seen.truth])
        total += float(np.mean(losses))
    return fits, total


def _fit_level(level: Sequence[Seen], before: Sequence[Floats], start: float, among: Among) -> LevelFit:
    """Return the fit of one level, given the scores of all candidates of the level before.

    Among all candidates, the scale, what is inherited and the weights of the evidence are fitted together.
    Among siblings, the scale is the one that makes the true tile likeliest of its siblings, and the weights
    follow.
    """
    names = sorted(level[0].evidence)
    first = level[0].above[0] < 0
    scale = start
    if among is Among.siblings and not first:
        alone = [_of_siblings(seen) for seen in level]
        scale = float(conditional_logit(alone, np.array([start]), np.array([_SCALE_PULL]))[0][0])
    scaled = among is Among.candidates or first

    def features(seen: Seen, scores: Floats) -> Floats:
        own = seen.cosines if scaled else log_softmax(scale * seen.cosines, seen.parents)
        inherited = np.zeros(len(own)) if first else scores[seen.above]
        extra = [log_softmax(seen.evidence[name], seen.parents) for name in names]
        return np.stack([own, inherited, *extra], axis=1)

    examples = [(features(seen, scores), seen.truth) for seen, scores in zip(level, before, strict=True)]
    # What the data leave open is not inherited: then the level decides alone, as in the paper.
    begin = np.array([start if scaled else 1.0, 0.0, *(0.0 for _ in names)])
    pull = np.array([_SCALE_PULL if scaled else _WEIGHT_PULL, *(_WEIGHT_PULL for _ in range(1 + len(names)))])
    weights, _ = conditional_logit(examples, begin, pull)
    return LevelFit(
        scale=float(weights[0]) if scaled else scale,
        weight=1.0 if scaled else float(weights[0]),
        inherited=float(weights[1]),
        among=among,
        evidence={name: float(value) for name, value in zip(names, weights[2:], strict=True)},
    )


def _of_siblings(seen: Seen) -> Example:
    own = np.flatnonzero(seen.parents == seen.parents[seen.truth])
    return seen.cosines[own][:, None], int(np.searchsorted(own, seen.truth))


def _scores(seen: Seen, before: Floats, fit: LevelFit) -> Floats:
    """Return the path scores of a photo's candidates, as `path_scores` computes them."""
    logits = fit.scale * seen.cosines
    if fit.among is Among.siblings:
        logits = log_softmax(logits, seen.parents)
    scores = fit.weight * logits
    if seen.above[0] >= 0:
        scores = scores + fit.inherited * before[seen.above]
    for name, values in seen.evidence.items():
        scores = scores + fit.evidence[name] * log_softmax(values, seen.parents)
    return log_softmax(scores, np.zeros(len(scores), dtype=np.int64))


def _loss(examples: Sequence[Example], weights: Floats) -> float:
    return float(np.mean([_log_sum_exp(x @ weights) - (x @ weights)[true] for x, true in examples]))


def _penalty(weights: Floats, start: Floats, pull: Floats) -> float:
    return float(0.5 * (pull * (weights - start) ** 2).sum())


def _derivatives(examples: Sequence[Example], weights: Floats) -> tuple[Floats, Floats]:
    """Return the gradient [m] and the curvature [m, m] of the mean loss."""
    gradient, curvature = np.zeros(len(weights)), np.zeros((len(weights), len(weights)))
    for features, true in examples:
        logits = features @ weights
        shares = np.exp(logits - _log_sum_exp(logits))
        mean = shares @ features
        gradient += mean - features[true]
        curvature += (features * shares[:, None]).T @ features - np.outer(mean, mean)
    return gradient / len(examples), curvature / len(examples)


def _log_sum_exp(values: Floats) -> float:
    top = float(values.max())
    return top + math.log(float(np.exp(values - top).sum()))


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function of one valley is least, by golden section, to a thousandth of the interval."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(16):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2
