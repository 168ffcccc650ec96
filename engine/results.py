"""What locating a photo yields: the answer, its ranked candidates and the beam of every level.

Writers for these results (JSON, GeoJSON, terminal table, HTML map) are in `geoengine.engine.render`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geoengine.engine.tiles import LngLat, Tile

DEMO_WORLD = "demo planet, not Earth"
"""What outputs for people call the built-in world."""

HYPOTHESIS = (
    "This is a hypothesis, not a proof: check it against other evidence, "
    "and do not use it to find people without their consent."
)
"""The sentence that every output for people carries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredTile:
    """A tile and how similar it is to the photo.

    `score` is what the search ranks tiles of one level by. Under the paper's score it is the cosine of the
    photo embedding and the tile embedding, -1 to 1; scores of different levels come from different encoders
    and are not comparable. Under the path score it is the natural logarithm of the probability that the
    photo was taken in this tile rather than in another one scored for it at this level: at most 0.
    """

    tile: Tile
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One stage of the search: what was looked at and what was kept.

    `zoom` is the zoom of its tiles. `candidates` counts the tiles scored for this photo, `missing` those that
    should have been scored but that the tile source does not have, `late` those that did not come in time.
    `beam` holds the tiles kept, best first.

    Of the candidates, `known` had an embedding before the search, in an index or from an earlier search, and
    `enlarged` were cut out of coarser tiles. In an `exhaustive` level all tiles of the searched area were
    scored from an index, not only those in the beam of the level before; `ancestors` are then the tiles that
    contain an answer and are not in the beam.
    """

    zoom: int
    candidates: int
    missing: int
    beam: tuple[ScoredTile, ...]
    late: int = 0
    known: int = 0
    enlarged: int = 0
    exhaustive: bool = False
    ancestors: tuple[ScoredTile, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of the level's wanted tiles that were scored, 0 to 1; 0 when none was wanted."""
        wanted = self.candidates + self.missing + self.late
        return self.candidates / wanted if wanted else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One possible answer: a tile of the last level, or a point of GeoCLIP's gallery and the tile around it.

    `rank` counts from 1. `point`, in degrees, is the centre of `tile` or the gallery's point. `score` is the
    tile's score at its level, or the point's. `share` is the candidate's part of a softmax over the last
    level's beam, or over the gallery, 0 to 1; it compares candidates with each other and says nothing of
    places that the search has dropped.
    `path` runs from the coarsest level to the candidate itself, each tile containing the next; a level that
    was searched and did not score the tile that contains the candidate is left out.
    """

    rank: int
    tile: Tile
    point: LngLat
    score: float
    share: float
    path: tuple[ScoredTile, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExifComparison:
    """How far an answer is from the GPS tag of its photo; only for evaluation, and only when asked for.

    `distance_km` is the great-circle distance, None when the photo has no GPS tag. The tag is not kept.
    """

    distance_km: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How a search ranked its tiles and chose its answer.

    `method` is "tiles", "geoclip" (points of a gallery in place of tiles), "joined" or "fused" (both).
    `score` is "paper" (the level's cosine), "path" (log-probabilities along the path) or, of method geoclip,
    "gallery" (the cosine of photo and point). `calibrated` says whether the path score's
    temperatures and weights were fitted, `centred` whether the mean of a level's embeddings was subtracted
    from each. `quota` is the most children of one parent in a beam, None for any number. `objective` is
    "best-tile" or the radius, such as "25km", within which the answer holds most probability. `prior` names
    how likely photos were taken to be anywhere, "" for everywhere alike.
    """

    method: str = "tiles"
    score: str = "paper"
    calibrated: bool = False
    centred: bool = False
    quota: int | None = None
    objective: str = "best-tile"
    prior: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a photo may have been taken.

    What method geoclip finds has no `levels`, `tiles` or `attribution`, and its shares are of the gallery.

    `photo` is the name of the photo; its pixels are not kept. `world` is "earth", or "planet" for the
    built-in demo world. `point` (degrees) and `score` are those of the first candidate. `candidates` are
    ranked, best first, at most `SearchConfig.top`; `levels` run from coarse to fine; `k` is the beam width.
    `tiles` names the tile source, `attribution` is what its licence asks to be shown ("" for nothing),
    `model` names the encoders. `seconds` is the wall time of the search divided by the number of photos
    searched together.

    `radius_km` is a measure of uncertainty. With `radius_calibrated`, the truth lay within the radius for the
    share `radius_share` of the photos that the bundle was calibrated on. Otherwise it says how much the last
    beam agrees with itself: it is the smallest great-circle distance from `point` within which at least
    `radius_share` of the candidates' softmax share lies, plus half the diagonal of the answer's tile; when an
    early level dropped the true place, the answer is far outside. `radii_km` has such a radius for each of
    `STATED_SHARES`. `scoring` says how tiles were ranked.

    `within` names the part of the world that was searched, "" for all of it. `left_out` are the levels that
    were asked for and that the tile source does not have.

    `exif` is None unless the caller compared the answer with the photo's GPS tag; the search never sees it.
    """

    photo: str
    world: str
    point: LngLat
    score: float
    radius_km: float
    candidates: tuple[Candidate, ...]
    levels: tuple[Level, ...]
    k: int
    tiles: str
    attribution: str
    model: str
    seconds: float
    within: str = ""
    left_out: tuple[int, ...] = ()
    scoring: Scoring = Scoring()
    radius_share: float = 2 / 3
    radius_calibrated: bool = False
    radii_km: tuple[float, ...] = ()
    exif: ExifComparison | None = None

    def radius_for(self, share: float) -> float:
        """Return the radius in km for one of `STATED_SHARES`; raises ValueError for another."""
        from geoengine.engine.calibration import STATED_SHARES

        radii = dict(zip(STATED_SHARES, self.radii_km, strict=False))
        nearest = min(radii, key=lambda stated: abs(stated - share), default=math.inf)
        if abs(nearest - share) > 1e-9:
            raise ValueError(f"radii are known for the shares {', '.join(map(str, radii))}, got {share}")
        return radii[nearest]
