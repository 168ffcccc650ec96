"""`geoengine locate`."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.levels import parse_levels
from geoengine.commands.options import (
    BackendOption,
    BundleOption,
    DeadlineOption,
    IndexOption,
    KOption,
    LevelsOption,
    MegapixelsOption,
    OverzoomOption,
    PrecisionOption,
    ThreadsOption,
    TilesOption,
    WithinOption,
)
from geoengine.commands.terminal import Exit, complain, progress_bar, waiting, write_result
from geoengine.engine.errors import GeoEngineError, PhotoError, SourceError

if TYPE_CHECKING:
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.photos import Photo, PhotoLimits
    from geoengine.engine.results import Location
    from geoengine.engine.search import SearchConfig

PHOTOS_PER_SEARCH = 64
"""Photos searched together: enough to share tiles, few enough that a folder's first results come early."""

_TILES_EXAMPLE = (
    "give the map tiles to search with --tiles, for example "
    "--tiles 'https://tiles.example.org/{z}/{x}/{y}.jpg', --tiles world.mbtiles or --tiles folder/"
)

_MapFile = Annotated[
    Path | None, typer.Option("--map", help="Also write a self-contained HTML map.", metavar="FILE.html")
]
_CompareExif = Annotated[
    bool,
    typer.Option("--compare-exif", help="Also print the distance to the GPS tag; for evaluation only."),
]


class Output(StrEnum):
    """What is written to stdout."""

    TABLE = "table"
    JSON = "json"
    GEOJSON = "geojson"

    def text(self, locations: list[Location]) -> str:
        """Return the results in this format."""
        if self is Output.JSON:
            from geoengine.engine.render.json_lines import json_lines

            return json_lines(locations)
        if self is Output.GEOJSON:
            from geoengine.engine.render.geojson import geojson_text

            return geojson_text(locations)
        from geoengine.engine.render.table import table_text

        return table_text(locations, sys.stdout)


def locate(
    photos: Annotated[list[Path], typer.Argument(help="Photos, or folders of photos.", metavar="PHOTO")],
    demo: Annotated[
        bool, typer.Option("--demo", help="Search the built-in demo planet, which is not Earth.")
    ] = False,
    k: KOption = 16,
    levels: LevelsOption = None,
    top: Annotated[int, typer.Option(help="Candidates reported per photo.")] = 5,
    within: WithinOption = None,
    bundle: BundleOption = None,
    tiles: TilesOption = None,
    index: IndexOption = None,
    overzoom: OverzoomOption = False,
    deadline: DeadlineOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    max_megapixels: MegapixelsOption = 100.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per photo and line.")] = False,
    as_geojson: Annotated[bool, typer.Option("--geojson", help="One GeoJSON FeatureCollection.")] = False,
    map_file: _MapFile = None,
    compare_exif: _CompareExif = False,
) -> None:
    """Find where photos may have been taken: a hypothesis, not a proof.

    Results go to stdout, everything else to stderr. GPS tags are not used for the answer, and photos are
    never written or logged. With a tile server, the server learns which places are searched. What was
    computed from tiles is kept for later searches, unless the environment variable GEOENGINE_CACHE is off.

    Exit status: 0 all photos were located; 1 some were not; 2 none was, or the command line was wrong.
    """
    output = _output(as_json, as_geojson)
    config = _config(k, levels, top, within, deadline, overzoom)
    order = Order.parse(demo, bundle, tiles, index, config, levels is None, max_megapixels)
    if map_file is not None:
        _check_writable(map_file)
    session = Session(order, compare_exif)
    paths = session.find(photos)
    with session.open(backend, precision, threads) as engine:
        for batch in session.locate(engine, paths):
            if output is not Output.GEOJSON:
                write_result(output.text(batch))
        if session.located and output is Output.GEOJSON:
            write_result(output.text(session.located))
        if session.located and map_file is not None:
            _write_map(map_file, session.located, engine)
    raise typer.Exit(session.status)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is searched, checked before anything is opened; `all_levels` are those that the bundle has."""

    bundle: str | None
    tiles: str | None
    index: Path | None
    config: SearchConfig
    all_levels: bool
    limits: PhotoLimits

    @classmethod
    def parse(
        cls,
        demo: bool,
        bundle: str | None,
        tiles: str | None,
        index: Path | None,
        config: SearchConfig,
        all_levels: bool,
        max_megapixels: float,
    ) -> Order:
        """Check the options against each other; raises GeoEngineError."""
        from geoengine.engine.photos import PhotoLimits

        if demo and (bundle is not None or tiles is not None):
            raise GeoEngineError(
                "--demo means --bundle planet --tiles planet already: leave out those two, or --demo"
            )
        if not 0 < max_megapixels <= 1e6:
            raise GeoEngineError(f"--max-megapixels must be above 0, got {max_megapixels:g}")
        return cls(
            bundle="planet" if demo else bundle,
            tiles="planet" if demo else tiles,
            index=index,
            config=config,
            all_levels=all_levels,
            limits=PhotoLimits(max_pixels=max(1, round(max_megapixels * 1e6))),
        )


class Session:
    """One run of the command: photos that fail are reported and counted, and the others located."""

    def __init__(self, order: Order, compare_exif: bool) -> None:
        self.order = order
        self.compare_exif = compare_exif
        self.located: list[Location] = []
        self.failed = 0

    @property
    def status(self) -> Exit:
        """The exit status that says what became of the photos."""
        if not self.located:
            return Exit.FAILED
        return Exit.SOME_FAILED if self.failed else Exit.DONE

    def find(self, given: Iterable[Path]) -> list[Path]:
        """Return the photos that files and folders stand for; without any, ends the command."""
        from geoengine.engine.photos import expand_photo_paths

        found: list[Path] = []
        for path in given:
            try:
                found += expand_photo_paths([path])
            except PhotoError as error:
                self._fail(error)
        if not found:
            raise typer.Exit(Exit.FAILED)
        return found

    def open(self, backend: str, precision: str | None, threads: int | None) -> GeoEngine:
        """Open the engine; raises GeoEngineError."""
        with waiting("loading the encoders"):
            from geoengine.engine.bundle import EngineBundle, resolve_bundle
            from geoengine.engine.engine import GeoEngine
            from geoengine.engine.index.known_rows import row_cache_folder

            bundle = resolve_bundle(self.order.bundle)
            of_planet = EngineBundle.open(bundle, verify=False).world == "planet"
            if self.order.tiles is None and not of_planet:
                raise SourceError(_TILES_EXAMPLE)
            return GeoEngine.open(
                bundle,
                self.order.tiles,
                backend=backend,
                precision=precision,
                threads=threads,
                index=self.order.index,
                row_cache=None if of_planet else row_cache_folder(),
            )

    def locate(self, engine: GeoEngine, paths: Iterable[Path]) -> Iterator[list[Location]]:
        """Yield the results of some photos at a time; after the first ones, a failing search just ends it."""
        rest = iter(paths)
        while chunk := list(itertools.islice(rest, PHOTOS_PER_SEARCH)):
            readable = [(path, photo) for path in chunk if (photo := self._read(engine, path)) is not None]
            if not readable:
                continue
            try:
                batch = self._search(engine, [photo for _, photo in readable])
            except GeoEngineError as error:
                if not self.located:
                    raise
                self._fail(error)
                return
            if self.compare_exif:
                batch = [_compared(place, path) for place, (path, _) in zip(batch, readable, strict=True)]
            self.located += batch
            yield batch

    def _read(self, engine: GeoEngine, path: Path) -> Photo | None:
        from geoengine.engine.photos import read_photo

        try:
            photo = read_photo(path, limits=self.order.limits)
        except PhotoError as error:
            self._fail(error)
            return None
        return engine.prepare(photo)  # which leaves a square alone when the engine does it again

    def _search(self, engine: GeoEngine, photos: list[Photo]) -> list[Location]:
        config = self.order.config
        if self.order.all_levels:
            config = dataclasses.replace(config, levels=engine.bundle.levels)
        with progress_bar("embedding the photos") as show:
            return engine.locate(
                photos,
                config=config,
                progress=lambda index, zoom, done, total: show(
                    f"level {index + 1}, zoom {zoom}", done, total
                ),
            )

    def _fail(self, error: GeoEngineError) -> None:
        complain(str(error))
        self.failed += 1


def _config(
    k: int, levels: str | None, top: int, within: str | None, deadline: float | None, overzoom: bool
) -> SearchConfig:
    from geoengine.engine.regions import parse_region
    from geoengine.engine.search import SearchConfig
    from geoengine.engine.tiles import LEVELS

    return SearchConfig(
        k=k,
        levels=LEVELS if levels is None else parse_levels(levels),
        top=top,
        within=None if within is None else parse_region(within),
        deadline_s=deadline,
        overzoom=overzoom,
    )


def _output(as_json: bool, as_geojson: bool) -> Output:
    if as_json and as_geojson:
        raise GeoEngineError("--json and --geojson exclude each other: choose one")
    return Output.JSON if as_json else Output.GEOJSON if as_geojson else Output.TABLE


def _compared(location: Location, path: Path) -> Location:
    from geoengine.engine.photos import read_gps
    from geoengine.engine.results import ExifComparison
    from geoengine.engine.tiles import great_circle_km

    tag = read_gps(path)
    distance_km = None if tag is None else great_circle_km(location.point, tag)
    return dataclasses.replace(location, exif=ExifComparison(distance_km=distance_km))


def _check_writable(path: Path) -> None:
    from geoengine.engine.render.files import check_writable

    if path.suffix.lower() not in (".html", ".htm"):  # `--map a.jpg b.jpg` would replace a photo
        raise GeoEngineError(f"{path}: --map writes an HTML page: give it a name that ends in .html")
    check_writable(path)


def _write_map(path: Path, locations: list[Location], engine: GeoEngine) -> None:
    from geoengine.engine.render.backdrop import read_backdrops
    from geoengine.engine.render.files import write_atomically
    from geoengine.engine.render.html_map import html_map

    with waiting("drawing the map"):
        try:
            backdrops = read_backdrops(locations, engine.source)
        except SourceError as error:
            complain(f"the map has no pictures: {error}")
            backdrops = []
        write_atomically(path, html_map(locations, backdrops=backdrops))
    complain(f"wrote {path}")
