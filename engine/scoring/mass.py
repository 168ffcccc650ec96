"""Where the photo's place may lie, as a distribution over the world, and the radii that follow from it.

Of the last level's beam, each tile gets a share of a softmax over the beam's scores, spread evenly over the
tile; a part `elsewhere` is spread evenly over the whole world, for places that the search has dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.results import Level
from geoengine.engine.tiles import (
    EARTH_RADIUS_KM,
    LngLat,
    centers,
    descendants_xy,
    great_circle_km_array,
    half_diagonal_km,
)

_SPREAD_ZOOMS = 3  # a tile's share lies in 8 x 8 parts
_HALVINGS = 60

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Mass:
    """How much of the probability lies within each distance of one point.

    What of the beam lies within `distances_km`, float64[n] and increasing, is `within`, float64[n]; between
    two of them it grows evenly. `elsewhere` is spread over the whole world.
    """

    distances_km: Floats
    within: Floats
    elsewhere: float

    @classmethod
    def around(cls, point: LngLat, level: Level, shares: Floats, *, elsewhere: float = 0.0) -> Mass:
        """Return the mass around a point, of a level whose beam has these shares, float64[beam], sum 1."""
        tiles = [scored.tile for scored in level.beam]
        deep = level.zoom + _SPREAD_ZOOMS
        parts = centers(deep, descendants_xy([tile[1:] for tile in tiles], level.zoom, deep))
        each = 4**_SPREAD_ZOOMS
        middle = great_circle_km_array(point.lng, point.lat, parts[:, 0], parts[:, 1])
        # A part is met evenly from its near to its far corner: a step at its centre would be too coarse.
        half = np.repeat([half_diagonal_km(tile) / 2**_SPREAD_ZOOMS for tile in tiles], each)
        near, far = np.maximum(middle - half, 0.0), middle + half
        slope = np.repeat(shares / each, each) / (far - near)
        knots = np.concatenate([near, far])
        order = np.argsort(knots, kind="stable")
        knots, change = knots[order], np.concatenate([slope, -slope])[order]
        grown = np.cumsum(change)[:-1] * np.diff(knots)
        return cls(knots, np.concatenate([[0.0], np.cumsum(grown)]), elsewhere)

    def share(self, km: float) -> float:
        """Return the share of the probability that lies within a distance, 0 to 1."""
        beam = float(np.interp(km, self.distances_km, self.within))
        return (1 - self.elsewhere) * beam + self.elsewhere * _cap_share(km)

    def radius_km(self, share: float) -> float:
        """Return the smallest distance within which a share of the probability lies, 0 to 1."""
        caps = (1 - np.cos(self.distances_km / EARTH_RADIUS_KM)) / 2
        reached = (1 - self.elsewhere) * self.within + self.elsewhere * caps
        at = int(np.searchsorted(reached, share))
        low = float(self.distances_km[at - 1]) if at else 0.0
        high = float(self.distances_km[at]) if at < len(reached) else math.pi * EARTH_RADIUS_KM
        if self.elsewhere <= 0 and at == len(reached):
            return low  # the sum of all shares came out an ulp short
        start, width = low, high - low
        before = float(self.within[at - 1]) if at else 0.0
        growth = (float(self.within[at]) - before if at < len(reached) else 0.0) / (width or 1.0)
        for _ in range(_HALVINGS):  # what lies elsewhere grows with the cosine, the rest evenly
            middle = (low + high) / 2
            beam = before + growth * (middle - start)
            if (1 - self.elsewhere) * beam + self.elsewhere * _cap_share(middle) >= share:
                high = middle
            else:
                low = middle
        return high


def softmax_shares(level: Level, sharpness: float) -> Floats:
    """Return the softmax of a beam's scores times a factor, float64[beam], in the beam's order."""
    logits = sharpness * np.array([scored.score for scored in level.beam], dtype=np.float64)
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def by_mass_within(level: Level, shares: Floats, radius_km: float) -> NDArray[np.int64]:
    """Return the places in the beam, int64[beam], first the tile whose centre has most share within a radius.

    A tile's share counts where its centre lies. Of tiles that hold the same to a hundredth of all, the better
    one is first: else a tile among many would win over the best of them.
    """
    points = centers(level.zoom, [scored.tile[1:] for scored in level.beam])  # (beam, 2)
    mass = np.array(
        [
            shares[great_circle_km_array(lng, lat, points[:, 0], points[:, 1]) <= radius_km].sum()
            for lng, lat in points.tolist()
        ]
    )
    return np.argsort(-np.round(mass, 2), kind="stable")


def _cap_share(km: float) -> float:
    """Return the part of the sphere within a distance of a point."""
    return (1 - math.cos(km / EARTH_RADIUS_KM)) / 2
