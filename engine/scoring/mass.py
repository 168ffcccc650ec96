"""Where the photo's place may lie, as a distribution over the world, and the radii that follow from it.

Of the last level's beam, each tile gets a share of a softmax over the beam's scores, spread evenly over the
tile; a part `elsewhere` is spread evenly over the whole world, for places that the search has dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.results import Level
from geoengine.engine.tiles import EARTH_RADIUS_KM, LngLat, centers, descendants_xy, great_circle_km_array

_SPREAD_ZOOMS = 3  # a tile's share lies at the centres of its 8 x 8 parts: to 6 % of its side

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Mass:
    """How much of the probability lies within each distance of one point.

    `distances_km`, float64[n], increase, and `within`, float64[n], is what of the beam lies up to there.
    """

    distances_km: Floats
    within: Floats
    elsewhere: float

    @classmethod
    def around(cls, point: LngLat, level: Level, shares: Floats, *, elsewhere: float = 0.0) -> Mass:
        """Return the mass around a point, of a level whose beam has these shares, float64[beam], sum 1."""
        xy = np.array([scored.tile[1:] for scored in level.beam], dtype=np.int64)
        deep = level.zoom + _SPREAD_ZOOMS
        parts = centers(deep, descendants_xy(xy, level.zoom, deep))
        each = 4**_SPREAD_ZOOMS
        distances = great_circle_km_array(point.lng, point.lat, parts[:, 0], parts[:, 1])
        order = np.argsort(distances, kind="stable")
        within = np.cumsum(np.repeat(shares / each, each)[order])
        return cls(distances[order], within, elsewhere)

    def share(self, km: float) -> float:
        """Return the share of the probability that lies within a distance, 0 to 1."""
        at = int(np.searchsorted(self.distances_km, km, side="right"))
        beam = float(self.within[at - 1]) if at else 0.0
        return (1 - self.elsewhere) * beam + self.elsewhere * float(_cap_share(km))

    def radius_km(self, share: float) -> float:
        """Return the smallest distance within which a share of the probability lies, 0 to 1."""
        beam = (1 - self.elsewhere) * self.within
        reached = beam + self.elsewhere * _cap_share(self.distances_km)
        # The sum of shares may come out an ulp short.
        at = int(np.searchsorted(reached, share - 1e-12))
        before = float(beam[at - 1]) if at else 0.0
        there = float(self.distances_km[at]) if at < len(beam) else np.pi * EARTH_RADIUS_KM
        if self.elsewhere <= 0 or share <= before:
            return min(there, float(self.distances_km[min(at, len(beam) - 1)]))
        # Between two parts of tiles only what lies elsewhere grows.
        fraction = min(1.0, (share - before) / self.elsewhere)
        return min(there, float(EARTH_RADIUS_KM * np.arccos(1 - 2 * fraction)))


def softmax_shares(level: Level, sharpness: float) -> Floats:
    """Return the softmax of a beam's scores times a factor, float64[beam], in the beam's order."""
    logits = sharpness * np.array([scored.score for scored in level.beam], dtype=np.float64)
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def by_mass_within(level: Level, shares: Floats, radius_km: float) -> NDArray[np.int64]:
    """Return the places in the beam, int64[beam], first the tile whose centre has most share within a radius.

    A tile's share counts where its centre lies. Of equal ones, the better tile is first.
    """
    points = centers(level.zoom, [scored.tile[1:] for scored in level.beam])  # (beam, 2)
    mass = np.array(
        [
            shares[great_circle_km_array(lng, lat, points[:, 0], points[:, 1]) <= radius_km].sum()
            for lng, lat in points.tolist()
        ]
    )
    # Sums of the same shares in another order may differ in the last digits.
    return np.argsort(-np.round(mass, 12), kind="stable")


def _cap_share(km: Floats | float) -> Floats:
    """Return the part of the sphere within a distance of a point."""
    return np.asarray((1 - np.cos(np.asarray(km) / EARTH_RADIUS_KM)) / 2)
