"""Accuracy of the whole chain on the built-in planet, whose truth is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from geoengine.bench.accuracy import Accuracy, Share, accuracy, wilson_share
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import BundleError, GeoEngineError
from geoengine.engine.photos import Photo
from geoengine.engine.results import Location
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import planet
from geoengine.engine.tiles import MAX_LATITUDE_DEG, LngLat, tile_at

PHOTOS_PER_CALL = 25
"""Photos located together, so that the tiles they share are read and encoded once."""

_DRAWS = 1024  # at once; fixed, so that the first places of a seed do not depend on how many are wanted

EvaluationProgress: TypeAlias = Callable[[int, int], None]
"""(searches done, searches in all); a search is one photo at one beam width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamReport:
    """The figures of one beam width.

    `recall` maps each level's zoom to the share of photos whose true tile was in that level's beam. `tiles`
    counts the distinct tiles that the calls read, `seconds` is the wall time of the calls: embedding the
    photos and the search, without drawing the photos.
    """

    k: int
    accuracy: Accuracy
    recall: dict[int, Share]
    tiles: int
    seconds: float

    @property
    def tiles_per_second(self) -> float:
        """Tiles read, encoded and scored per second of wall time."""
        return self.tiles / self.seconds

    @property
    def seconds_per_photo(self) -> float:
        """Wall time per photo, when `PHOTOS_PER_CALL` are located together."""
        return self.seconds / self.accuracy.photos

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values."""
        return {
            "k": self.k,
            **self.accuracy.to_dict(),
            "recall": {str(zoom): share.to_dict() for zoom, share in self.recall.items()},
            "tiles": self.tiles,
            "seconds": self.seconds,
            "tiles_per_second": self.tiles_per_second,
            "seconds_per_photo": self.seconds_per_photo,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """An evaluation: what was evaluated, and the figures of each beam width in the order asked for."""

    world: str
    model: str
    backend: str
    photos: int
    seed: int
    beams: tuple[BeamReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "world": self.world,
            "model": self.model,
            "backend": self.backend,
            "photos": self.photos,
            "seed": self.seed,
            "beams": [beam.to_dict() for beam in self.beams],
        }


def evaluate_planet(
    *,
    photos: int,
    ks: Sequence[int],
    seed: int,
    engine: GeoEngine | None = None,
    progress: EvaluationProgress | None = None,
) -> Report:
    """Locate photos of random land places of the planet at each beam width and report how far off they are.

    Places are uniform over the planet's land by area. The photos are drawn in memory and the search sees
    nothing but their pixels. The same seed gives the same places and photos, and more photos begin with those
    of fewer. `engine` is by default the package's own for the planet; a given one stays open. Raises
    GeoEngineError for numbers below 1 or a negative seed, BundleError when the engine is for another world.
    """
    if photos < 1 or not ks:
        raise GeoEngineError(f"an evaluation needs at least one photo and one k, got {photos} and {list(ks)}")
    if seed < 0:
        raise GeoEngineError(f"seed must be 0 or more, got {seed}")
    if len(set(ks)) < len(ks):
        raise GeoEngineError(f"an evaluation needs each k once, got {list(ks)}")
    configs = [SearchConfig(k=k) for k in ks]  # refuses a bad k before anything is opened
    if engine is None:
        with GeoEngine.open("planet", "planet") as opened:
            return _evaluate(opened, photos, configs, seed, progress)
    return _evaluate(engine, photos, configs, seed, progress)


def land_places(count: int, seed: int) -> list[LngLat]:
    """Return random places on the planet's land, uniform by area between the latitudes that tiles cover."""
    rng = np.random.default_rng([seed, 0])
    top = math.sin(math.radians(MAX_LATITUDE_DEG))
    places: list[LngLat] = []
    while len(places) < count:
        lng = rng.uniform(-180.0, 180.0, _DRAWS)
        lat = np.degrees(np.arcsin(rng.uniform(-top, top, _DRAWS)))
        land = planet.is_land(lng, lat)
        places += [LngLat(*point) for point in zip(lng[land].tolist(), lat[land].tolist(), strict=True)]
    return places[:count]


@dataclass(slots=True)
class _Tally:
    """What the calls with one beam width have given so far."""

    config: SearchConfig
    locations: list[Location] = field(default_factory=list)
    tiles: int = 0
    seconds: float = 0.0

    def locate(self, engine: GeoEngine, photos: list[Photo]) -> None:
        totals: dict[int, int] = {}

        def note(index: int, zoom: int, done: int, total: int) -> None:
            totals[index] = total

        start = time.perf_counter()
        self.locations += engine.locate(photos, config=self.config, progress=note)
        self.seconds += time.perf_counter() - start
        self.tiles += sum(totals.values())

    def report(self, truth: Sequence[LngLat], levels: Sequence[int]) -> BeamReport:
        return BeamReport(
            k=self.config.k,
            accuracy=accuracy([location.point for location in self.locations], truth),
            recall={zoom: wilson_share(sum(self._kept(truth, zoom)), len(truth)) for zoom in levels},
            tiles=self.tiles,
            seconds=self.seconds,
        )

    def _kept(self, truth: Sequence[LngLat], zoom: int) -> Iterator[bool]:
        """Whether the true tile of a zoom is in that level's beam, for each photo."""
        for location, place in zip(self.locations, truth, strict=True):
            yield tile_at(place, zoom) in {scored.tile for level in location.levels for scored in level.beam}


def _evaluate(
    engine: GeoEngine,
    photos: int,
    configs: Sequence[SearchConfig],
    seed: int,
    progress: EvaluationProgress | None,
) -> Report:
    if engine.bundle.world != "planet":
        raise BundleError(f"only the planet has known truth, and this engine is for {engine.bundle.world!r}")
    levels = engine.bundle.levels
    tallies = [_Tally(SearchConfig(k=config.k, levels=levels)) for config in configs]
    truth = land_places(photos, seed)
    done = 0
    for batch in _photos(truth, seed):
        for tally in tallies:
            tally.locate(engine, batch)
            done += len(batch)
            if progress is not None:
                progress(done, photos * len(tallies))
    manifest = engine.bundle.manifest
    return Report(
        world=engine.bundle.world,
        model=f"{manifest.model}/{manifest.pretrained}",
        backend=engine.backend.name,
        photos=photos,
        seed=seed,
        beams=tuple(tally.report(truth, levels) for tally in tallies),
    )


def _photos(places: Sequence[LngLat], seed: int) -> Iterator[list[Photo]]:
    """Draw the photos of the places, `PHOTOS_PER_CALL` at a time; their names say nothing of the places."""
    seeds = np.random.default_rng([seed, 1]).integers(2**31, size=len(places)).tolist()
    for start in range(0, len(places), PHOTOS_PER_CALL):
        yield [
            Photo(name=f"planet photo {i + 1}", pixels=planet.photo(places[i].lat, places[i].lng, seeds[i]))
            for i in range(start, min(start + PHOTOS_PER_CALL, len(places)))
        ]
