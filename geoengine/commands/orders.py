"""What commands are told to search with, and how: their options, checked before anything is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from geoengine.commands.levels import parse_levels
from geoengine.commands.terminal import waiting
from geoengine.engine.errors import BundleError, GeoEngineError, SourceError
from geoengine.engine.scoring.kinds import Method

if TYPE_CHECKING:
    from geoengine.engine.bulk.engines import EngineSpec
    from geoengine.engine.bulk.stream import PhotoSearch
    from geoengine.engine.bundle import EngineBundle
    from geoengine.engine.cluster import Cluster
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.photos import PhotoLimits
    from geoengine.engine.scoring.kinds import Score
    from geoengine.engine.search import SearchConfig

_TILES_EXAMPLE = (
    "give the map tiles to search with --tiles, for example "
    "--tiles 'https://tiles.example.org/{z}/{x}/{y}.jpg', --tiles world.mbtiles or --tiles folder/"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOrder:
    """What photos are searched with; checked before anything is opened."""

    bundle: str | None
    tiles: str | None
    index: Path | None
    backend: str
    precision: str | None
    threads: int | None
    method: Method

    @classmethod
    def parse(
        cls,
        demo: bool,
        bundle: str | None,
        tiles: str | None,
        index: Path | None,
        backend: str,
        precision: str | None,
        threads: int | None,
        method: Method,
    ) -> EngineOrder:
        """Check the options against each other; raises GeoEngineError."""
        if demo and (bundle is not None or tiles is not None):
            raise GeoEngineError(
                "--demo means --bundle planet --tiles planet already: leave out those two, or --demo"
            )
        return cls(
            bundle="planet" if demo else bundle,
            tiles="planet" if demo else tiles,
            index=index,
            backend=backend,
            precision=precision,
            threads=threads,
            method=method,
        )

    def open(self, *, rows: Path | None = None) -> GeoEngine:
        """Open the engine; raises GeoEngineError.

        `rows` is the folder in which embeddings of tiles are kept where they have no other place.
        """
        with waiting("loading the encoders"):
            return self.spec().open(rows=rows)

    def spec(self) -> EngineSpec:
        """Return what any process can open; raises GeoEngineError for what cannot be searched with."""
        from geoengine.engine.bulk.engines import EngineSpec, anywhere
        from geoengine.engine.bundle import EngineBundle, resolve_bundle
        from geoengine.engine.geoclip import no_geoclip, no_map_encoders

        bundle = resolve_bundle(self.bundle)
        there = EngineBundle.open(bundle, verify=False)
        of_planet = there.world == "planet"
        if self.method.asks_geoclip and not there.has_geoclip:
            raise BundleError(no_geoclip(there))
        if self.method.searches and not there.levels:
            raise BundleError(no_map_encoders(there))
        if self.method.searches and self.tiles is None and not of_planet:
            raise SourceError(_TILES_EXAMPLE)
        return EngineSpec(
            bundle="planet" if self.bundle == "planet" else str(bundle.absolute()),
            tiles=None if self.tiles is None else anywhere(self.tiles),
            index=None if self.index is None else self.index.absolute(),
            backend=self.backend,
            precision=self.precision,
            threads=self.threads,
            keeps_rows=not of_planet,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterOrder:
    """Which Ray cluster does the work."""

    address: str
    workers: int | None
    threads: int | None

    @classmethod
    def parse(cls, address: str | None, workers: int | None, threads: int | None) -> ClusterOrder | None:
        """Check the options against each other, None without a cluster; raises GeoEngineError."""
        if address is None:
            if workers is not None:
                raise GeoEngineError("--workers needs --ray: on one machine, --threads takes more cores")
            return None
        for name, value in (("--workers", workers), ("--threads", threads)):
            if value is not None and value < 1:
                raise GeoEngineError(f"{name} must be at least 1, got {value}")
        return cls(address=address, workers=workers, threads=threads)

    def open(self) -> AbstractContextManager[Cluster]:
        """Connect to the cluster; raises GeoEngineError."""
        from geoengine.engine.cluster import open_cluster

        return open_cluster(self.address, count=self.workers, threads=self.threads)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOrder:
    """How photos are read and searched; with `all_levels`, the levels are those that the bundle has."""

    config: SearchConfig
    all_levels: bool
    limits: PhotoLimits
    compare_exif: bool

    @classmethod
    def parse(
        cls, config: SearchConfig, all_levels: bool, max_megapixels: float, compare_exif: bool
    ) -> SearchOrder:
        """Check the options; raises GeoEngineError."""
        from geoengine.engine.photos import PhotoLimits

        if not 0 < max_megapixels <= 1e6:
            raise GeoEngineError(f"--max-megapixels must be above 0, got {max_megapixels:g}")
        limits = PhotoLimits(max_pixels=max(1, round(max_megapixels * 1e6)))
        return cls(config=config, all_levels=all_levels, limits=limits, compare_exif=compare_exif)

    def search(self, bundle: EngineBundle) -> PhotoSearch:
        """Return what is asked of an engine with this bundle."""
        from geoengine.engine.bulk.stream import PhotoSearch

        config = self.config
        if self.all_levels and bundle.levels:
            config = dataclasses.replace(config, levels=bundle.levels)
        return PhotoSearch(config=config, limits=self.limits, compare_exif=self.compare_exif)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringOrder:
    """What is asked, how tiles are scored and the answer is chosen, as the options say it."""

    score: Score | None = None
    quota: int | None = None
    centred: bool = False
    objective: str = "best-tile"
    prior: str | None = None
    method: Method = Method.tiles


def beam_widths(given: Sequence[str], more: Sequence[int] | None) -> list[int]:
    """Return the beam widths of `--k 16,32 --k 64` and of the numbers after it; raises GeoEngineError."""
    try:
        widths = [int(part) for text in given for part in text.split(",")]
    except ValueError:
        raise GeoEngineError(f"beam widths are numbers such as --k 16,32,64, got {' '.join(given)}") from None
    return [*widths, *(more or [])]


def search_config(
    k: int,
    levels: str | None,
    top: int,
    within: str | None,
    deadline: float | None,
    overzoom: bool,
    scoring: ScoringOrder,
) -> SearchConfig:
    """Return the search that the options describe; raises GeoEngineError."""
    from geoengine.engine.regions import parse_region
    from geoengine.engine.scoring.kinds import Objective
    from geoengine.engine.search import SearchConfig
    from geoengine.engine.tiles import LEVELS

    return SearchConfig(
        k=k,
        levels=LEVELS if levels is None else parse_levels(levels),
        top=top,
        within=None if within is None else parse_region(within),
        deadline_s=deadline,
        overzoom=overzoom,
        score=scoring.score,
        quota=scoring.quota,
        centred=scoring.centred,
        objective=Objective.parse(scoring.objective),
        prior=scoring.prior,
        method=scoring.method,
    )
