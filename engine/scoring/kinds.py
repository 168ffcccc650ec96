"""The choices of a search: which score ranks its tiles, and what its answer is to be best at."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from geoengine.engine.errors import GeoEngineError

_RADIUS = re.compile(r"(\d+(?:\.\d+)?) ?km", re.ASCII)


class Score(StrEnum):
    """What ranks the tiles of a level.

    `paper` is the level's cosine alone (Algorithm 1). `path` adds to it, as
    log-probabilities, what the levels before said of the tiles that contain it.
    """

    paper = "paper"
    path = "path"


class Method(StrEnum):
    """What is asked where a photo was taken.

    `tiles` is the search of map tiles alone. `geoclip` is GeoCLIP alone, which needs no tiles. Two ask both:
    `joined`, where the tile that holds GeoCLIP's best point joins the beam at every level (the paper's 5.1),
    and `fused`, where what GeoCLIP says of each tile enters the path score.
    """

    tiles = "tiles"
    geoclip = "geoclip"
    joined = "joined"
    fused = "fused"

    @classmethod
    def parse(cls, name: str) -> Method:
        """Return the method of a name; raises GeoEngineError for an unknown one."""
        try:
            return cls(name)
        except ValueError:
            raise GeoEngineError(f"a method is {', '.join(cls)}, got {name!r}") from None

    @property
    def searches(self) -> bool:
        """Whether it searches map tiles."""
        return self is not Method.geoclip

    @property
    def asks_geoclip(self) -> bool:
        """Whether it needs GeoCLIP in the bundle."""
        return self is not Method.tiles


@dataclass(frozen=True, slots=True)
class Objective:
    """What the answer is to be: the best tile, or, with `radius_km`, the centre of most probability.

    The latter is the candidates' centre within `radius_km` of which most of their probability lies.
    """

    radius_km: float | None = None

    def __post_init__(self) -> None:
        radius = self.radius_km
        if radius is not None and not (math.isfinite(radius) and radius > 0):
            raise GeoEngineError(f"the radius of an objective must be more than 0 km, got {radius:g}")

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Return the objective that "best-tile" or a radius such as "25km" names; raises GeoEngineError."""
        if text == str(BEST_TILE):
            return BEST_TILE
        match = _RADIUS.fullmatch(text)
        if match is None:
            raise GeoEngineError(f"an objective is {BEST_TILE} or a radius such as 25km, got {text!r}")
        return cls(float(match[1]))

    def __str__(self) -> str:
        return "best-tile" if self.radius_km is None else f"{self.radius_km:g}km"


BEST_TILE = Objective()
"""The usual objective."""
