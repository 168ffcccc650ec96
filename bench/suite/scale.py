"""How cost grows: with the photos of a call, with the beam width, and with the rows of an index.

Cost must grow with distinct tiles, and not with photos times tiles. How many tiles photos share is a matter
of what encoders have learnt, so it is measured with trained ones: those of the built-in planet, over all of
the planet. "region" are photos within `REGION_KM` of one place, "world" photos from anywhere.

Random ViT-B/32 encoders know no places: their beams would be shared or not for no reason. So their series of
photos reads, encodes and ranks, through the engine's own code, the very tiles that the trained search of the
same photos asked for: the time is that of real-size encoders, the sharing that of trained ones. How many
tiles one photo needs at a beam width does not depend on weights, and there they search by themselves.
`scale_rows` measures indices.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.suite import workload
from geoengine.bench.suite.results import Progress, Results
from geoengine.bench.suite.scale_rows import measure_rows
from geoengine.bench.suite.scale_tables import GOAL_PHOTOS, key_figures, plots, tables
from geoengine.bench.suite.timing import Spread
from geoengine.engine.bundle import PLANET, EngineBundle
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import SourceError
from geoengine.engine.level import Reading, embed_level
from geoengine.engine.manifest import encoder_name
from geoengine.engine.results import Location
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import planet
from geoengine.engine.tiles import LngLat, all_xy, descendants_xy

__all__ = ["PARTS", "ScaleSettings", "key_figures", "measure", "plots", "tables"]

PARTS = ("photos", "k", "rows")
COUNTS = (1, 4, 16, 64, 256)
FOLLOWED = (1, GOAL_PHOTOS, 16, 4, 256)
"""Counts in the order in which slow encoders are given them: the goal's first."""

REGION_KM = 2.0
_SEED = 1  # of the places; chosen before anything was measured
_KM_PER_DEG = 111.195
_SHORT_S, _ROUNDS = 3.0, 3  # shorter calls are repeated

Candidates: TypeAlias = dict[int, NDArray[np.int64]]
"""Tiles of one level by photo, int64[n, 2]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSettings:
    """What is measured: the `parts`, with encoders of `bundle` besides the planet's.

    A series of measurements (one bundle, one kind of photos) takes about `seconds`: what would not fit any
    more is left out and says so. Photos are located with beam width `k`.
    """

    parts: tuple[str, ...] = PARTS
    bundle: str | None = None
    seconds: float = 230.0
    k: int = 16
    counts: tuple[int, ...] = COUNTS
    index_rows: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7)

    @property
    def benchmark(self) -> str:
        """The name of the file of results: some parts alone must not replace all."""
        return "scale" if self.parts == PARTS else "-".join(("scale", *self.parts))

    def to_dict(self) -> dict[str, Any]:
        """Return them JSON-ready."""
        return asdict(self)


def measure(settings: ScaleSettings, results: Results, progress: Progress) -> None:
    """Add the rows of all parts; raises GeoEngineError."""
    with ExitStack() as stack:
        series: list[Series] = []
        if set(settings.parts) & {"photos", "k"}:
            trained = Series("planet", stack.enter_context(_trained()))
            series.append(trained)
            folder = workload.resolve_bundle(
                settings.bundle, lambda done, total, what: progress(what, done, total)
            )
            if folder.resolve() != PLANET.resolve():
                series.append(Series("", stack.enter_context(_open(folder))))
            results.state(series={own.name: own.about for own in series}, region_km=REGION_KM)
        if "photos" in settings.parts:
            scenes = [Scene("region", settings, trained), Scene("world", settings, trained)]
            for scene in scenes:
                measure_search(scene, results, settings, progress)
            for own in series[1:]:
                measure_followed(own, scenes[0], results, settings, progress)
        if "k" in settings.parts:
            for own in series:
                measure_k(own, results, settings, progress)
    if "rows" in settings.parts:
        measure_rows(settings.index_rows, results, progress)


def _trained() -> GeoEngine:
    return GeoEngine.open("planet", "planet")


def _open(folder: Path) -> GeoEngine:
    world = EngineBundle.open(folder).world
    return GeoEngine.open(folder, workload.PooledTiles(workload.tile_pool(), world))


class Series:
    """Encoders that are measured; graphs are loaded, so that the first call is like the others."""

    def __init__(self, name: str, engine: GeoEngine) -> None:
        self.engine = engine
        manifest = engine.bundle.manifest
        self.name = name or f"{manifest.model}, {manifest.pretrained}"
        self.about = f"{engine.backend.name}, {engine.backend.variant}"

    @cached_property
    def ready(self) -> bool:
        """Load what the first call would load; true."""
        side = self.engine.source.tile_size
        pictures = np.zeros((self.engine.backend.batch, side, side, 3), np.uint8)
        for zoom in self.engine.bundle.levels:
            self.engine.backend.encode(encoder_name(zoom), pictures)
        self.engine.embed_photos([self.engine.prepare(pictures[0])])
        return True

    def config(self, k: int) -> SearchConfig:
        """Return a search of all levels."""
        return SearchConfig(k=k, levels=self.engine.bundle.levels)


class Scene:
    """Photos of one region or of the world, and where trained encoders went with each."""

    def __init__(self, name: str, settings: ScaleSettings, trained: Series) -> None:
        self.name, self._settings, self.trained = name, settings, trained
        self._found: list[Location] = []

    @cached_property
    def photos(self) -> Sequence[NDArray[np.uint8]]:
        """Draw the photos, uint8[h, w, 3], as many as the largest call has."""
        count = max(self._settings.counts)
        if self.name == "world":
            return workload.drawn_photos(count, _SEED)
        places = near(workload.drawn_places(1, _SEED)[0], count, REGION_KM)
        return [planet.photo(place.lat, place.lng, n, height=224) for n, place in enumerate(places)]

    def locate(self, count: int) -> list[Location]:
        """Locate the first photos in one call."""
        found = self.trained.engine.locate(self.photos[:count], config=self.trained.config(self._settings.k))
        if count > len(self._found):
            self._found = found
        return found

    def found(self, count: int) -> list[Location]:
        """Return where the first photos went; photos of a call do not influence each other."""
        return self._found[:count] if count <= len(self._found) else self.locate(count)


def near(place: LngLat, count: int, km: float) -> list[LngLat]:
    """Return random places on the planet's land within so many kilometres of one."""
    rng = np.random.default_rng(_SEED)
    found: list[LngLat] = []
    while len(found) < count:
        north, east = rng.uniform(-km, km, 2).tolist()
        lat = place.lat + north / _KM_PER_DEG
        lng = place.lng + east / _KM_PER_DEG / float(np.cos(np.radians(place.lat)))
        if np.hypot(north, east) <= km and planet.is_land([lng], [lat])[0]:
            found.append(LngLat(lng, lat))
    return found


def measure_search(scene: Scene, results: Results, settings: ScaleSettings, progress: Progress) -> None:
    """Add rows of trained encoders that search for themselves, more and more photos in a call."""
    spent = Budget(settings.seconds)
    for count in settings.counts:
        own = {"part": "photos", "series": scene.trained.name, "scene": scene.name, "photos": count}
        key = "/".join(map(str, own.values()))
        if results.known(key):
            continue
        progress(f"{count} photos, {scene.name}", 0, None)
        if (needs := spent.needs(count)) is not None:
            results.add(key, **own, left_out_s=needs)
            continue
        assert scene.trained.ready and len(scene.photos) >= count
        found, seconds = timed(partial(scene.locate, count))
        spent.add(count, seconds)
        results.add(key, **own, **tiles_of(candidates_of(found)), seconds=seconds.to_dict())


def measure_followed(
    series: Series, scene: Scene, results: Results, settings: ScaleSettings, progress: Progress
) -> None:
    """Add rows of encoders that follow the trained ones' search."""
    spent = Budget(settings.seconds)
    for count in sorted(settings.counts, key=(*FOLLOWED, *settings.counts).index):
        own = {"part": "photos", "series": series.name, "scene": scene.name, "photos": count}
        key = "/".join(map(str, own.values()))
        if results.known(key):
            continue
        progress(f"{count} photos, {series.name}", 0, None)
        levels = candidates_of(scene.found(count))
        tiles = tiles_of(levels)
        if (needs := spent.needs(tiles["distinct"])) is not None:
            results.add(key, **own, **tiles, left_out_s=needs)
            continue
        assert series.ready
        photos = scene.photos[:count]
        _, seconds = timed(partial(follow, series, photos, levels, settings.k))
        spent.add(tiles["distinct"], seconds)
        results.add(key, **own, **tiles, seconds=seconds.to_dict())


def measure_k(series: Series, results: Results, settings: ScaleSettings, progress: Progress) -> None:
    """Add rows of one photo and wider and wider beams."""
    spent = Budget(settings.seconds)
    photo = workload.drawn_photos(1, _SEED)
    for k in settings.counts:
        key = f"k/{series.name}/{k}"
        if results.known(key):
            continue
        progress(f"k = {k}, {series.name}", 0, None)
        tiles = tiles_at(series.engine.bundle.levels, k)
        own = {"part": "k", "series": series.name, "k": k, "distinct": tiles}
        if (needs := spent.needs(tiles)) is not None:
            results.add(key, **own, left_out_s=needs)
            continue
        assert series.ready
        _, seconds = timed(partial(series.engine.locate, photo, config=series.config(k)))
        spent.add(tiles, seconds)
        results.add(key, **own, seconds=seconds.to_dict())


class Budget:
    """Time for a series; what a measurement needs follows from those before, by units of work."""

    def __init__(self, seconds: float) -> None:
        self._left, self._rate = seconds, 0.0

    def needs(self, units: int) -> float | None:
        """Return the seconds that a measurement would take when there are fewer left, else None."""
        needed = units * self._rate
        return needed if needed > self._left else None

    def add(self, units: int, seconds: Spread) -> None:
        """Count a measurement."""
        self._left -= seconds.median * seconds.rounds
        self._rate = seconds.median / units


def timed(call: Callable[[], Any]) -> tuple[Any, Spread]:
    """Return what a call returns, and its time: of several calls where one is short."""
    times: list[float] = []
    while not times or (times[0] < _SHORT_S and len(times) < _ROUNDS):
        start = time.perf_counter()
        answer = call()
        times.append(time.perf_counter() - start)
    return answer, Spread.of(times)


def candidates_of(found: Sequence[Location]) -> dict[int, Candidates]:
    """Return the tiles that searches asked for, by zoom and photo."""
    levels: dict[int, Candidates] = {}
    first = found[0].levels[0].zoom
    levels[first] = dict.fromkeys(range(len(found)), all_xy(first))
    for photo, location in enumerate(found):
        for above, level in itertools.pairwise(location.levels):
            xy = descendants_xy([scored.tile[1:] for scored in above.beam], above.zoom, level.zoom)
            levels.setdefault(level.zoom, {})[photo] = xy
    return levels


def tiles_of(levels: Mapping[int, Candidates]) -> dict[str, int]:
    """Return how many tiles photos asked for, and how many distinct ones those are."""
    asked = sum(len(xy) for level in levels.values() for xy in level.values())
    return {"asked": asked, "distinct": sum(_distinct(level.values()) for level in levels.values())}


def _distinct(lists: Iterable[NDArray[np.int64]]) -> int:
    return len(np.unique(np.concatenate([xy[:, 0] << 32 | xy[:, 1] for xy in lists])))


def tiles_at(levels: Sequence[int], k: int) -> int:
    """Return how many tiles one photo needs in all of the world."""
    tiles = last = 1 << 2 * levels[0]
    for above, zoom in itertools.pairwise(levels):
        last = min(k, last) << 2 * (zoom - above)
        tiles += last
    return tiles


def follow(
    series: Series, photos: Sequence[NDArray[np.uint8]], levels: Mapping[int, Candidates], k: int
) -> None:
    """Do all the work of a search whose beams are given: photos and tiles embedded, tiles ranked.

    Raises SourceError when a tile is missing: the time would be that of less work.
    """
    engine = series.engine
    queries = engine.embed_photos([engine.prepare(photo) for photo in photos])
    reading = Reading(
        source=engine.source,
        encoders=engine.backend,
        deadline_s=None,
        overzoom=False,
        progress=lambda done, total: None,
    )
    for zoom, candidates in levels.items():
        tiles = embed_level(reading, None, zoom, candidates.values())
        if (tiles.rows < 0).any():
            raise SourceError(
                f"tile source {engine.source.name} lacks tiles of zoom {zoom}: give one of all tiles"
            )
        _exhaust(tiles.rank(candidates, queries, k))


def _exhaust(rows: Iterator[object]) -> None:
    for _ in rows:
        pass
