"""`geoengine locate`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.bulk import BulkOrder, locate_into
from geoengine.commands.options import (
    BackendOption,
    BundleOption,
    CentredOption,
    DeadlineOption,
    FormatOption,
    IndexOption,
    KOption,
    LevelsOption,
    MegapixelsOption,
    MethodOption,
    ObjectiveOption,
    OutOption,
    OverzoomOption,
    PartOption,
    PrecisionOption,
    PriorOption,
    QuotaOption,
    RayOption,
    RestartOption,
    RetryOption,
    ScoreOption,
    ThreadsOption,
    TilesOption,
    WithinOption,
    WorkersOption,
)
from geoengine.commands.orders import ClusterOrder, EngineOrder, ScoringOrder, SearchOrder, search_config
from geoengine.commands.terminal import Exit, complain, progress_bar, waiting, write_result
from geoengine.engine.errors import GeoEngineError, SourceError
from geoengine.engine.scoring.kinds import Method

if TYPE_CHECKING:
    from geoengine.engine.bulk.items import Items
    from geoengine.engine.bulk.stream import Outcome, Searched
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.results import Location

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
    photos: Annotated[
        list[Path],
        typer.Argument(
            help="Photos, folders, .csv, .tsv or .parquet tables, WebDataset tars.", metavar="PHOTO"
        ),
    ],
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
    method: MethodOption = Method.tiles,
    score: ScoreOption = None,
    quota: QuotaOption = None,
    centred: CentredOption = False,
    objective: ObjectiveOption = "best-tile",
    prior: PriorOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    max_megapixels: MegapixelsOption = 100.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per photo and line.")] = False,
    as_geojson: Annotated[bool, typer.Option("--geojson", help="One GeoJSON FeatureCollection.")] = False,
    map_file: _MapFile = None,
    compare_exif: _CompareExif = False,
    out: OutOption = None,
    out_format: FormatOption = None,
    photos_per_part: PartOption = 64,
    restart: RestartOption = False,
    retry_failed: RetryOption = False,
    ray: RayOption = None,
    workers: WorkersOption = None,
) -> None:
    """Find where photos may have been taken: a hypothesis, not a proof.

    Results go to stdout, everything else to stderr. GPS tags are not used for the answer, and photos are
    never written or logged. With a tile server, the server learns which places are searched. What was
    computed from tiles is kept for later searches, unless the environment variable GEOENGINE_CACHE is off.

    With --out, any number of photos: results are written a part at a time, photos that cannot be read are
    listed with reasons beside them, and the same command goes on where it was interrupted.

    Exit status: 0 all photos were located; 1 some were not; 2 none was, or the command line was wrong.
    """
    output = _output(as_json, as_geojson)
    cluster = ClusterOrder.parse(ray, workers, threads)
    bulk = BulkOrder.parse(out, out_format, photos_per_part, restart, retry_failed, cluster)
    if bulk is not None and (output is not Output.TABLE or map_file is not None):
        raise GeoEngineError("--out excludes --json, --geojson and --map")
    scoring = ScoringOrder(
        score=score, quota=quota, centred=centred, objective=objective, prior=prior, method=method
    )
    config = search_config(k, levels, top, within, deadline, overzoom, scoring)
    engine_order = EngineOrder.parse(demo, bundle, tiles, index, backend, precision, threads, method)
    order = SearchOrder.parse(config, levels is None, max_megapixels, compare_exif)
    if map_file is not None:
        _check_writable(map_file)
    if bulk is not None:
        raise typer.Exit(locate_into(bulk, photos, engine_order, order))
    session = Session(order)
    found = session.find(photos)
    kept: list[Location] = []  # what is written at the end, when all is there
    with engine_order.open() as engine:
        for batch in session.locate(engine, found):
            if output is not Output.GEOJSON:
                write_result(output.text(batch))
            if output is Output.GEOJSON or map_file is not None:
                kept += batch
        if kept and output is Output.GEOJSON:
            write_result(output.text(kept))
        if kept and map_file is not None:
            _write_map(map_file, kept, engine)
    raise typer.Exit(session.status)


class Session:
    """One run of the command: photos that fail are reported and counted, and the others located."""

    def __init__(self, order: SearchOrder) -> None:
        self.order = order
        self.located = 0
        self.failed = 0

    @property
    def status(self) -> Exit:
        """The exit status that says what became of the photos."""
        if not self.located:
            return Exit.FAILED
        return Exit.SOME_FAILED if self.failed else Exit.DONE

    def find(self, given: Iterable[Path]) -> Items:
        """Return the photos that files, folders, tables and tars stand for; without any, ends the command."""
        from geoengine.engine.bulk.items import Items
        from geoengine.engine.photo_sets import open_photo_set

        sets = []
        for spec in given:
            try:
                sets.append(open_photo_set(spec))
            except GeoEngineError as error:
                self._fail(str(error))
        if not sets:
            raise typer.Exit(Exit.FAILED)
        return Items(sets)

    def locate(self, engine: GeoEngine, photos: Items) -> Iterator[list[Location]]:
        """Yield the results of some photos at a time; after the first ones, a failing search just ends it."""
        from geoengine.engine.bulk.stream import Failure, locate_stream

        numbered = ((0, item) for item in photos)
        shown = _Shown()
        with contextlib.closing(
            locate_stream(engine, numbered, self.order.search(engine.bundle), shown.search)
        ) as stream:
            try:
                while (outcomes := shown.next(stream)) is not None:
                    for failure in (outcome for outcome in outcomes if isinstance(outcome, Failure)):
                        self._fail(failure.reason)
                    batch = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
                    self.located += len(batch)
                    if batch:
                        yield batch
            except GeoEngineError as error:
                if not self.located:
                    raise
                self._fail(str(error))
        if not self.located and not self.failed:
            self._fail("there is no photo in what was given")

    def _fail(self, reason: str) -> None:
        complain(reason)
        self.failed += 1


class _Shown:
    """A progress bar that is there only while photos are read and searched, not while results are written."""

    def __init__(self) -> None:
        self._show: Callable[[str, int, int | None], None] = lambda description, done, total: None

    def next(self, stream: Iterator[Searched]) -> list[Outcome] | None:
        """Return what became of the next photos, None after the last ones."""
        with progress_bar("reading the photos") as self._show:
            searched = next(stream, None)
        return None if searched is None else searched.outcomes

    def search(self, index: int, zoom: int, done: int, total: int) -> None:
        """Show how far a search is."""
        self._show(f"level {index + 1}, zoom {zoom}", done, total)


def _output(as_json: bool, as_geojson: bool) -> Output:
    if as_json and as_geojson:
        raise GeoEngineError("--json and --geojson exclude each other: choose one")
    return Output.JSON if as_json else Output.GEOJSON if as_geojson else Output.TABLE


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
