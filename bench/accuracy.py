"""How far predicted places are from the true ones, in the figures that the field reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geoengine.engine.tiles import LngLat, great_circle_km_array

THRESHOLDS_KM = (1.0, 25.0, 200.0, 750.0, 2500.0)
"""Street, city, region, country, continent, as in Tables 1 and 2 of the paper."""

_Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A part of `total` with its Wilson 95 % interval, `low` to `high`; all of them 0 to 1."""

    hits: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Hits divided by the total."""
        return self.hits / self.total

    def to_dict(self) -> dict[str, Any]:
        """Return the share as JSON-ready values."""
        return {"share": self.value, "hits": self.hits, "total": self.total, "ci95": [self.low, self.high]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """The share of photos placed at most each distance in km away, and the median error in km."""

    photos: int
    within_km: dict[float, Share]
    median_km: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values; distances become keys such as "25"."""
        within = {f"{km:g}": share.to_dict() for km, share in self.within_km.items()}
        return {"photos": self.photos, "within_km": within, "median_km": self.median_km}


def wilson_share(hits: int, total: int) -> Share:
    """Return hits of total with the Wilson score interval at 95 % (E. B. Wilson, 1927); total >= 1."""
    if not 0 <= hits <= total or total < 1:
        raise ValueError(f"need 0 <= hits <= total and total >= 1, got {hits} of {total}")
    p, z2 = hits / total, _Z_95**2
    middle = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z_95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # At 0 and at all hits an end of the interval is 0 or 1 but for rounding.
    low = 0.0 if hits == 0 else middle - half
    high = 1.0 if hits == total else middle + half
    return Share(hits=hits, total=total, low=low, high=high)


def accuracy(
    predicted: Sequence[LngLat], true: Sequence[LngLat], thresholds_km: Sequence[float] = THRESHOLDS_KM
) -> Accuracy:
    """Return the accuracy of predicted places against the true ones, given in the same order.

    Distances are great-circle on the sphere of `geoengine.engine.tiles`. Raises ValueError when there is no
    place or the two lists differ in length.
    """
    if not predicted or len(predicted) != len(true):
        raise ValueError(f"need one true place for each prediction, got {len(predicted)} and {len(true)}")
    guess, truth = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)  # (n, 2)
    errors_km = great_circle_km_array(guess[:, 0], guess[:, 1], truth[:, 0], truth[:, 1])
    return Accuracy(
        photos=len(predicted),
        within_km={km: wilson_share(int((errors_km <= km).sum()), len(predicted)) for km in thresholds_km},
        median_km=float(np.median(errors_km)),
    )
