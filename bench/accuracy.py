"""How far predicted places are from the true ones, in the figures that the field reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.extras import require_extra
from geoengine.engine.tiles import LngLat, great_circle_km_array

THRESHOLDS_KM = (1.0, 25.0, 200.0, 750.0, 2500.0)
"""Street, city, region, country, continent, as in Tables 1 and 2 of the paper."""

GEOSCORE_BEST = 5000.0
_GEOSCORE_KM = 1492.7  # of the GeoGuessr game's world map, as PIGEON and OSV-5M take it

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
    """The figures of `photos` photos, of which `located` have an answer at all.

    A photo without an answer is a miss at every distance, infinitely far for the median, and worth no points
    in `geoscore`, the mean of 5000 exp(-error / 1492.7 km). `median_km` is infinite when at least half of the
    photos have no answer; `mean_km` is over those that have one, and NaN when none has.
    """

    photos: int
    located: int
    within_km: dict[float, Share]
    median_km: float
    mean_km: float
    geoscore: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values; distances become keys such as "25"."""
        return {
            "photos": self.photos,
            "located": self.located,
            "within_km": {f"{km:g}": share.to_dict() for km, share in self.within_km.items()},
            "median_km": self.median_km if math.isfinite(self.median_km) else None,
            "mean_km": self.mean_km if math.isfinite(self.mean_km) else None,
            "geoscore": self.geoscore,
        }


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


def errors_km(
    predicted: Sequence[LngLat | None], true: Sequence[LngLat], *, geodesic: bool = False
) -> NDArray[np.float64]:
    """Return the distances in km between the places of two lists, float64[n]; infinite for a None.

    Distances are great-circle on the sphere of `geoengine.engine.tiles`, R = 6371.0088 km; with `geodesic`,
    the shortest way on the WGS84 ellipsoid, which needs the extra `evaluate`. Raises ValueError when the
    lists differ in length.
    """
    if len(predicted) != len(true):
        raise ValueError(f"need one true place for each prediction, got {len(predicted)} and {len(true)}")
    distances = np.full(len(true), np.inf)
    there = [i for i, place in enumerate(predicted) if place is not None]
    if not there:
        return distances
    guess = np.array([predicted[i] for i in there], dtype=np.float64)  # (n, 2)
    truth = np.array([true[i] for i in there], dtype=np.float64)
    distance = _geodesic_km if geodesic else great_circle_km_array
    distances[there] = distance(guess[:, 0], guess[:, 1], truth[:, 0], truth[:, 1])
    return distances


def accuracy(errors: NDArray[np.float64], thresholds_km: Sequence[float] = THRESHOLDS_KM) -> Accuracy:
    """Return the accuracy of `errors`, float64[n] in km as from `errors_km`; a threshold includes its end.

    Raises ValueError when there is none.
    """
    if not len(errors):
        raise ValueError("the accuracy of no photos is not defined")
    found = errors[np.isfinite(errors)]
    # not np.median, which averages two infinities, or one with a number, with a warning
    middle = np.sort(errors)[[(len(errors) - 1) // 2, len(errors) // 2]]
    return Accuracy(
        photos=len(errors),
        located=len(found),
        within_km={km: wilson_share(int((errors <= km).sum()), len(errors)) for km in thresholds_km},
        median_km=float(middle.sum() / 2),
        mean_km=float(found.mean()) if len(found) else math.nan,
        geoscore=float(GEOSCORE_BEST * np.exp(-errors / _GEOSCORE_KM).mean()),
    )


def check_geodesic() -> None:
    """Raise MissingExtraError when geodesic distances cannot be computed here."""
    require_extra("evaluate", ("geographiclib",), "distances on the ellipsoid")


def _geodesic_km(
    lng: NDArray[np.float64], lat: NDArray[np.float64], lng2: NDArray[np.float64], lat2: NDArray[np.float64]
) -> NDArray[np.float64]:
    check_geodesic()
    from geographiclib.geodesic import Geodesic

    inverse, only = Geodesic.WGS84.Inverse, Geodesic.DISTANCE
    columns = (lat.tolist(), lng.tolist(), lat2.tolist(), lng2.tolist())
    return np.array([inverse(*ends, only)["s12"] / 1000 for ends in zip(*columns, strict=True)])
