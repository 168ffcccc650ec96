"""Evaluation: photos of known places are located, and every search leaves a row."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from geoengine.bench.accuracy import errors_km
from geoengine.bench.evaluate_rows import PhotoRow, Results, Setting
from geoengine.bench.truth import TruthError, TruthPhoto, TruthSet
from geoengine.engine.bulk.identity import region_identity
from geoengine.engine.calibration import CALIBRATION, STATED_SHARES
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import BundleError, GeoEngineError, PhotoError
from geoengine.engine.manifest import encoder_hash
from geoengine.engine.photos import Photo
from geoengine.engine.results import Location
from geoengine.engine.scoring.kinds import Method
from geoengine.engine.search import SearchConfig, levels_of
from geoengine.engine.tiles import tile_at

PHOTOS_PER_CALL = 25
"""Photos located together by default, so that the tiles they share are read and encoded once."""

EvaluationProgress: TypeAlias = Callable[[str, int, int], None]
"""(what is being done, searches done, searches in all); a search is one photo with one setting."""


def setting_of(config: SearchConfig) -> Setting:
    """Return what the rows of a search are filed under; its configuration names a score.

    GeoCLIP alone has neither a score of tiles nor a beam.
    """
    if not config.method.searches:
        return Setting(config.method.value, "gallery", 0)
    assert config.score is not None, "GeoEngine.resolved chooses one"
    return Setting(config.method.value, config.score.value, config.k)


def job_of(engine: GeoEngine, truth: TruthSet, configs: Sequence[SearchConfig]) -> dict[str, Any]:
    """Return all that the rows depend on but their own setting, JSON-ready, one level deep.

    Raises GeoEngineError unless the configurations differ in their settings and in nothing else, BundleError
    when the photos are of another world than the encoders, TruthError when the bundle was calibrated on them.
    """
    if not configs:
        raise GeoEngineError("an evaluation needs at least one k")
    settings = [setting_of(config) for config in configs]
    if len(set(settings)) < len(settings):
        twice = next(setting for setting in settings if settings.count(setting) > 1)
        raise GeoEngineError(f"an evaluation needs each setting once, got {' '.join(map(str, twice))} twice")
    searches = [_search_of(config) for config in configs if config.method.searches]
    searches = searches or [_search_of(config) for config in configs]
    if any(search != searches[0] for search in searches):
        raise GeoEngineError("the configurations of one evaluation must have the same levels and options")
    bundle = engine.bundle
    if bundle.world != truth.world:
        raise BundleError(
            f"{truth.title} shows the world {truth.world!r}, and engine bundle {bundle.path} knows "
            f"{bundle.world!r}: give a bundle of that world"
        )
    calibration = bundle.calibration
    if calibration is not None and calibration.identity == truth.identity:
        raise TruthError(
            f"engine bundle {bundle.path} was calibrated on these very photos ({truth.title}): evaluate with "
            "others, of the planet with another --seed"
        )
    return {
        "data_set": truth.identity,
        **_bundle_of(engine),
        "backend": f"{engine.backend.name} {engine.backend.variant}",
        "tiles": engine.source.identity,
        "index": _index_of(engine),
        "embeddings": "new" if engine.known is None else "kept, in half precision",
        **searches[0],
    }


def levels_searched(engine: GeoEngine, config: SearchConfig) -> list[int]:
    """Return the zooms of which rows may have ranks."""
    return levels_of(engine.source, config.levels, overzoom=config.overzoom)


def _search_of(config: SearchConfig) -> dict[str, str]:
    """Return the configuration but for what a setting says and what changes no answer."""
    own = {*Setting._fields, "top"}
    options = {f.name: str(getattr(config, f.name)) for f in fields(config) if f.name not in own}
    prior = Path(config.prior or "")
    if prior.is_file():  # whose name says little
        options["prior"] = hashlib.sha256(prior.read_bytes()).hexdigest()
    if config.within is not None:
        options["within"] = f"{config.within.name}, {region_identity(config.within)[:16]}"
    return options


def _bundle_of(engine: GeoEngine) -> dict[str, str]:
    """Return hashes of what a bundle's answers depend on: encoders, calibration, GeoCLIP; "" for none."""
    bundle = engine.bundle
    calibration = bundle.path / CALIBRATION
    geoclip = bundle.geoclip()
    return {
        "encoders": encoder_hash(bundle.manifest),
        "calibration": hashlib.sha256(calibration.read_bytes()).hexdigest() if calibration.exists() else "",
        "geoclip": "" if geoclip is None else encoder_hash(geoclip.manifest),
    }


def _index_of(engine: GeoEngine) -> str:
    """Return which levels an index scores whole, and where; "" without an index."""
    if engine.known is None or engine.known.index is None:
        return ""
    description = engine.known.index.description
    return f"zooms {', '.join(map(str, description.complete))} of {'; '.join(map(str, description.areas))}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """An evaluation under way: which photos are located with which settings, by what, and into which rows.

    `together` photos are located at a time.
    """

    engine: GeoEngine
    truth: TruthSet
    configs: Sequence[SearchConfig]
    results: Results
    together: int = PHOTOS_PER_CALL

    def run(self, progress: EvaluationProgress | None = None) -> None:
        """Locate what has no row yet; whatever stops it, the rows that are there stay.

        Photos that cannot be read become rows with a problem. Raises what the set, the engine and the disk
        raise.
        """
        if self.together < 1:
            raise GeoEngineError(f"at least one photo is located at a time, got {self.together}")
        pending = [photo.key for photo in self.truth if self._lacking(photo)]
        wanted, count = set(pending), _Count(progress, len(pending) * len(self.configs))
        photos = (photo for photo in self.truth if photo.key in wanted)
        while batch := list(itertools.islice(photos, self.together)):
            for rows in self._batch(batch, count):
                self.results.add(rows)
            count.add(len(batch) * len(self.configs))

    def _lacking(self, photo: TruthPhoto) -> list[SearchConfig]:
        return [c for c in self.configs if self.results.row(setting_of(c), photo.key) is None]

    @property
    def _squares(self) -> Method:
        """The method that needs all the squares of a photo that any of the configurations does."""
        if not any(config.method.asks_geoclip for config in self.configs):
            return Method.tiles
        return Method.joined if any(config.method.searches for config in self.configs) else Method.geoclip

    def _batch(self, batch: Sequence[TruthPhoto], count: _Count) -> Iterator[list[PhotoRow]]:
        """Yield the rows of some photos: first those that cannot be read, then setting by setting."""
        read: dict[str, Photo] = {}
        problems: list[PhotoRow] = []
        for truth in batch:
            try:
                read[truth.key] = self.engine.prepare(truth.read(), method=self._squares)
            except PhotoError as error:
                problems += [_problem(truth, setting_of(config), error) for config in self._lacking(truth)]
        yield problems
        for config in self.configs:
            setting = setting_of(config)
            chosen = [t for t in batch if t.key in read and self.results.row(setting, t.key) is None]
            if chosen:
                yield self._located(chosen, [read[truth.key] for truth in chosen], config, count)

    def _located(
        self, chosen: Sequence[TruthPhoto], photos: Sequence[Photo], config: SearchConfig, count: _Count
    ) -> list[PhotoRow]:
        totals: dict[int, int] = {}

        def note(index: int, zoom: int, done: int, total: int) -> None:
            totals[index] = total
            count.show(f"searches done; k={config.k}, zoom {zoom}, tile {done} of {total}")

        start = time.perf_counter()
        locations = self.engine.locate(photos, config=config, progress=note)
        seconds = (time.perf_counter() - start) / len(photos)
        tiles = sum(totals.values()) / len(photos)
        return [
            _row(truth, setting_of(config), location, tiles, seconds)
            for truth, location in zip(chosen, locations, strict=True)
        ]


class _Count:
    """Searches done, out of a total, and whom to tell."""

    def __init__(self, progress: EvaluationProgress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add(self, searches: int) -> None:
        self._done += searches
        self.show("searches done")

    def show(self, doing: str) -> None:
        if self._progress is not None:
            self._progress(doing, self._done, self._total)


def _row(truth: TruthPhoto, setting: Setting, location: Location, tiles: float, seconds: float) -> PhotoRow:
    levels = location.levels
    return PhotoRow(
        photo=truth.key,
        setting=setting,
        true=truth.place,
        place=location.point,
        error_km=float(errors_km([location.point], [truth.place])[0]),
        radius_km=location.radius_km,
        radii_km=dict(zip(STATED_SHARES, map(float, location.radii_km), strict=False)),
        calibrated=location.radius_calibrated,
        ranks={level.zoom: _rank(truth, location, level.zoom) for level in levels},
        scored=sum(level.candidates for level in levels),
        wanted=sum(level.candidates + level.missing + level.late for level in levels),
        tiles=tiles,
        seconds=seconds,
    )


def _rank(truth: TruthPhoto, location: Location, zoom: int) -> int:
    """Return the true tile's place in a level's beam, from 1; 0 when it is not there."""
    [level] = [level for level in location.levels if level.zoom == zoom]
    true = tile_at(truth.place, zoom)
    return next((rank for rank, scored in enumerate(level.beam, 1) if scored.tile == true), 0)


def _problem(truth: TruthPhoto, setting: Setting, error: PhotoError) -> PhotoRow:
    words = " ".join(str(error).split())  # one line, whatever the file is called
    return PhotoRow(photo=truth.key, setting=setting, true=truth.place, radii_km={}, ranks={}, problem=words)
