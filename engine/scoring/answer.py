"""From the levels of a search to its answer: ranked candidates, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.calibration import STATED_SHARES, Fit, RadiusFit
from geoengine.engine.results import Candidate, Level, ScoredTile
from geoengine.engine.scoring.kinds import Objective, Score
from geoengine.engine.scoring.mass import Mass, by_mass_within, softmax_shares
from geoengine.engine.tiles import Tile, center, centers, great_circle_km_array, half_diagonal_km, parent

CALIBRATED_SHARE = 0.8
"""The share of truths that lie within a calibrated radius."""

RADIUS_SHARE = 2 / 3
"""The part of the last beam's softmax share that lies within an uncalibrated one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The candidates of a search, best first, and the radii around the first one.

    `radii_km` has one for each of `STATED_SHARES`. The others are as in `Location`.
    """

    candidates: tuple[Candidate, ...]
    radius_km: float
    radius_share: float
    radius_calibrated: bool
    radii_km: tuple[float, ...]


def answer(
    levels: Sequence[Level],
    *,
    top: int,
    objective: Objective,
    sharpness: float,
    radius: RadiusFit | None,
) -> Answer:
    """Return the answer of a search from its levels, coarse to fine, at least one.

    `sharpness` multiplies the last beam's scores in the softmax that gives candidates their shares. `radius`
    was fitted for searches of this kind and has a sharpness of its own; None makes the radius uncalibrated.
    """
    last = levels[-1]
    shares = softmax_shares(last, sharpness if radius is None else radius.sharpness)
    order = np.arange(len(last.beam))
    if objective.radius_km is not None:
        order = by_mass_within(last, shares, objective.radius_km)
    candidates = tuple(
        Candidate(
            rank=rank,
            tile=last.beam[place].tile,
            point=center(last.beam[place].tile),
            score=last.beam[place].score,
            share=float(shares[place]),
            path=_path(last.beam[place].tile, levels),
        )
        for rank, place in enumerate(order[:top].tolist(), start=1)
    )
    first = int(order[0])
    if radius is None:
        return Answer(
            candidates=candidates,
            radius_km=uncertainty_radius_km(last, shares, first=first),
            radius_share=RADIUS_SHARE,
            radius_calibrated=False,
            radii_km=tuple(
                uncertainty_radius_km(last, shares, share, first=first) for share in STATED_SHARES
            ),
        )
    mass = Mass.around(candidates[0].point, last, shares, elsewhere=radius.elsewhere)
    radii = tuple(mass.radius_km(share) for share in radius.shares)
    return Answer(
        candidates=candidates,
        radius_km=radii[STATED_SHARES.index(CALIBRATED_SHARE)],
        radius_share=CALIBRATED_SHARE,
        radius_calibrated=True,
        radii_km=radii,
    )


def fitted_radius(fit: Fit, score: Score, k: int) -> RadiusFit | None:
    """Return the radius that was fitted for a score and a beam width, None where there is none."""
    return next((radius for radius in fit.radii.get(score, ()) if radius.k == k), None)


def uncertainty_radius_km(
    level: Level, shares: NDArray[np.float64], share: float = RADIUS_SHARE, *, first: int = 0
) -> float:
    """Return the radius in km around a tile's centre within which a share of the beam's lies.

    `shares` is float64[beam], summing to 1. The radius is the smallest great-circle distance from the centre
    of the beam's tile `first` such that the tiles whose centres lie within it hold at least `share`, plus
    half the diagonal of that tile. It measures how much the beam agrees with itself and is not calibrated: it
    knows nothing of places that the search has dropped.
    """
    points = centers(level.zoom, [scored.tile[1:] for scored in level.beam])  # (beam, 2)
    lng, lat = points[first]
    distances = great_circle_km_array(lng, lat, points[:, 0], points[:, 1])  # (beam,)
    nearest_first = np.argsort(distances, kind="stable")
    within = np.cumsum(shares[nearest_first])
    # The sum of shares that make up the share exactly may come out an ulp short.
    reached = int(np.searchsorted(within, share - 1e-12))
    return float(distances[nearest_first[reached]]) + half_diagonal_km(level.beam[first].tile)


def _path(tile: Tile, levels: Sequence[Level]) -> tuple[ScoredTile, ...]:
    """Return the tile's scored ancestor in each level, coarse to fine, and itself."""
    path = []
    for level in levels:
        ancestor = parent(tile, level.zoom)
        path += [scored for scored in (*level.beam, *level.ancestors) if scored.tile == ancestor]
    return tuple(path)
