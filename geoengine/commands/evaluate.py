"""`geoengine evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.calibrate import FIRST_SEED
from geoengine.commands.options import (
    BackendOption,
    BundleOption,
    CentredOption,
    DeadlineOption,
    IndexOption,
    LevelsOption,
    MegapixelsOption,
    ObjectiveOption,
    OverzoomOption,
    PrecisionOption,
    PriorOption,
    QuotaOption,
    ThreadsOption,
    TilesOption,
    WithinOption,
)
from geoengine.commands.orders import EngineOrder, ScoringOrder, SearchOrder, beam_widths, search_config
from geoengine.commands.terminal import Exit, complain, progress_bar, waiting, write_result
from geoengine.engine.errors import GeoEngineError, MissingExtraError
from geoengine.engine.scoring.kinds import BEST_TILE, Method, Score

if TYPE_CHECKING:
    from geoengine.bench.evaluate_report import Report
    from geoengine.bench.truth import TruthSet
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.search import SearchConfig


class Plots(StrEnum):
    """What the plots are written as."""

    SVG = "svg"
    PNG = "png"
    NONE = "none"


_DataSet = Annotated[
    str,
    typer.Argument(
        metavar="DATASET",
        help="planet, im2gps, im2gps3k, yfcc4k, or photos with places: a .csv, .tsv or .parquet table, "
        "a folder with one, or WebDataset .tar files.",
    ),
]
_MoreK = Annotated[
    list[int] | None,
    typer.Argument(metavar="K", show_default=False, help="More beam widths, as in --k 16 32 64."),
]
_Ks = Annotated[
    list[str], typer.Option("--k", help="Beam widths: 16,32,64, or the option several times.", metavar="K,…")
]
_Scores = Annotated[
    list[Score] | None,
    typer.Option("--score", help="paper or path, as in locate; twice for both. Default: the bundle's best."),
]
_Methods = Annotated[
    list[Method],
    typer.Option("--method", help="tiles, geoclip, joined or fused, as in locate; may be repeated."),
]
_Photos = Annotated[Path | None, typer.Option(help="Folder of the photos, where the table does not say.")]
_Places = Annotated[Path | None, typer.Option(help="Table of the photos' places.", metavar="FILE")]
_Count = Annotated[
    int | None,
    typer.Option(help="Photos drawn of the planet (default 200), or chosen at random from another set."),
]
_Seeds = Annotated[
    list[int],
    typer.Option(
        "--seed", help="The same seed gives the same photos; of the planet, several give --count photos each."
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for rows, report, tables and plots; the same command goes on there.", metavar="DIR"
    ),
]
_Again = Annotated[bool, typer.Option("--again", help="Throw away the rows in --out and start anew.")]
_Together = Annotated[int, typer.Option(help="Photos located together; 1 times each photo alone.")]
_Reuse = Annotated[
    bool,
    typer.Option("--reuse", help="Keep tile embeddings between the searches: faster, but not a fair time."),
]
_Geodesic = Annotated[
    bool, typer.Option("--geodesic", help="Distances on the WGS84 ellipsoid, not on the sphere.")
]
_Training = Annotated[
    Path | None,
    typer.Option(help="What the encoders were trained on; photos that are in it are refused.", metavar="DIR"),
]
_PlotsOption = Annotated[list[Plots], typer.Option(help="Kind of the plots in --out.")]
_Parquet = Annotated[bool, typer.Option("--parquet", help="Also write the rows in --out as Parquet.")]
_Json = Annotated[bool, typer.Option("--json", help="The report as a JSON object instead of tables.")]


def evaluate(
    data_set: _DataSet,
    more_k: _MoreK = None,
    k: _Ks = ["16"],  # noqa: B006
    score: _Scores = None,
    method: _Methods = [Method.tiles],  # noqa: B006
    photos: _Photos = None,
    places: _Places = None,
    count: _Count = None,
    seed: _Seeds = [1],  # noqa: B006
    out: _Out = None,
    again: _Again = False,
    parquet: _Parquet = False,
    plots: _PlotsOption = [Plots.SVG],  # noqa: B006
    training: _Training = None,
    geodesic: _Geodesic = False,
    together: _Together = 25,
    reuse: _Reuse = False,
    levels: LevelsOption = None,
    within: WithinOption = None,
    bundle: BundleOption = None,
    tiles: TilesOption = None,
    index: IndexOption = None,
    quota: QuotaOption = None,
    centred: CentredOption = False,
    objective: ObjectiveOption = "best-tile",
    prior: PriorOption = None,
    overzoom: OverzoomOption = False,
    deadline: DeadlineOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    max_megapixels: MegapixelsOption = 100.0,
    as_json: _Json = False,
) -> None:
    """Measure how accurate the search is, on photos whose place is known.

    Photos that cannot be read count as misses. Every row says how many photos it is of, and has 95 %
    intervals; published figures stand apart from those measured here. With --out, results are kept as they
    come: the same command goes on where a run was stopped, and adds further beam widths.

    Exit status: 0 all photos were located; 1 some could not be read; 2 nothing could be done.
    """
    from geoengine.bench.truth_sets import open_truth_set, refuse_trained

    scoring = ScoringOrder(quota=quota, centred=centred, objective=objective, prior=prior)
    config = search_config(1, levels, 1, within, deadline, overzoom, scoring)
    configs = _configs(config, method, score or [], beam_widths(k, more_k))
    limits = SearchOrder.parse(config, levels is None, max_megapixels, compare_exif=False).limits
    job = Job(data_set=data_set, out=out, again=again, together=together, geodesic=geodesic, parquet=parquet)
    job.check(plots, max(seed))
    truth = open_truth_set(data_set, photos=photos, table=places, count=count, seeds=seed, limits=limits)
    if training is not None:
        with waiting("looking for the photos among those of the training"):
            refuse_trained(truth, training)
    bundle = "planet" if truth.world == "planet" and bundle is None else bundle
    order = EngineOrder.parse(False, bundle, tiles, index, backend, precision, threads, _needed(method))
    with _opened(order, reuse) as engine:
        if levels is None and engine.bundle.levels:
            configs = [replace(each, levels=engine.bundle.levels) for each in configs]
        configs = [engine.resolved(each) for each in configs]
        report = job.run(engine, truth, configs)
    _write_files(report, job, plots)
    write_result(_text(report, as_json))
    raise typer.Exit(_status(report))


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of the command, checked before anything is opened."""

    data_set: str
    out: Path | None
    again: bool
    together: int
    geodesic: bool
    parquet: bool

    def check(self, plots: Sequence[Plots], seed: int) -> None:
        """Raise GeoEngineError for options that cannot be, or that need packages that are not there."""
        from geoengine.bench.accuracy import check_geodesic
        from geoengine.engine.extras import require_extra

        if self.out is None and (self.again or self.parquet):
            raise GeoEngineError("--again and --parquet are about the folder of results: give it with --out")
        if self.data_set == "planet" and seed >= FIRST_SEED:
            raise GeoEngineError(
                f"the planet's photos of seeds from {FIRST_SEED} on are for calibrate, got {seed}: evaluate "
                "with a smaller one"
            )
        if self.together < 1:
            raise GeoEngineError(f"--together must be at least 1, got {self.together}")
        if self.parquet:
            require_extra("parquet", ("pyarrow",), "writing Parquet")
        if self.geodesic:
            check_geodesic()
            if self.data_set == "planet":
                raise GeoEngineError("the planet is a sphere: leave out --geodesic")
        if self.out is not None and any(kind is not Plots.NONE for kind in plots):
            from geoengine.bench.evaluate_plots import check_plots

            try:
                check_plots()
            except MissingExtraError as error:
                raise MissingExtraError(f"{error}, or give --plots none") from None

    def run(self, engine: GeoEngine, truth: TruthSet, configs: Sequence[SearchConfig]) -> Report:
        """Locate what has no row yet, and return the report; raises GeoEngineError."""
        from geoengine.bench.evaluate import Evaluation, job_of, levels_searched
        from geoengine.bench.evaluate_report import make_report
        from geoengine.bench.evaluate_rows import Results
        from geoengine.engine.calibration import STATED_SHARES

        made_of, zooms = job_of(engine, truth, configs), levels_searched(engine, configs[0])
        opened = (
            nullcontext(Results(made_of, zooms, STATED_SHARES))
            if self.out is None
            else Results.open(self.out, made_of, zooms, STATED_SHARES, again=self.again)
        )
        with opened as results:
            run = Evaluation(
                engine=engine, truth=truth, configs=configs, results=results, together=self.together
            )
            with progress_bar("reading the photos") as show:
                run.run(show)
            return make_report(
                engine, truth, configs, results, together=self.together, geodesic=self.geodesic
            )


def _configs(
    config: SearchConfig, methods: Sequence[Method], scores: Sequence[Score], widths: Sequence[int]
) -> list[SearchConfig]:
    """Return the searches of every method with every score and beam width; raises GeoEngineError.

    GeoCLIP alone is one search, and fusion leaves out the paper's score when there are others.
    """
    if not widths or not methods:
        raise GeoEngineError("an evaluation needs at least one k and one method")
    found = []
    for method in methods:
        chosen: list[Score | None] = [*scores] or [None]
        if method is Method.fused and len(chosen) > 1:
            chosen = [score for score in chosen if score is not Score.paper]
        if method.searches:
            found += [replace(config, method=method, score=s, k=k) for s in chosen for k in widths]
        else:
            plain = replace(config, quota=None, centred=False, objective=BEST_TILE, prior=None)
            found.append(replace(plain, method=method))
    return found


def _needed(methods: Sequence[Method]) -> Method:
    """Return the method that needs all that any of them needs."""
    if not any(method.asks_geoclip for method in methods):
        return Method.tiles
    return Method.joined if any(method.searches for method in methods) else Method.geoclip


@contextmanager
def _opened(order: EngineOrder, reuse: bool) -> Iterator[GeoEngine]:
    """Open the engine, with `reuse` so that no tile is encoded twice, and close it."""
    with ExitStack() as stack:
        rows = Path(stack.enter_context(TemporaryDirectory(prefix="geoengine-rows-"))) if reuse else None
        yield stack.enter_context(order.open(rows=rows))


def _write_files(report: Report, job: Job, plots: Sequence[Plots]) -> None:
    """Write report, tables, plots and the list of unreadable photos; without a folder, name those photos."""
    if job.out is None:
        for problem in report.problems.values():
            complain(problem)
        return
    from geoengine.bench.evaluate_files import write_files

    with waiting("drawing the plots"):
        write_files(
            report, job.out, [kind.value for kind in plots if kind is not Plots.NONE], parquet=job.parquet
        )
    complain(f"wrote {job.out}")


def _text(report: Report, as_json: bool) -> str:
    if as_json:
        return json.dumps(report.to_dict(), indent=2) + "\n"
    from geoengine.bench.evaluate_tables import terminal_text

    return terminal_text(report, sys.stdout)


def _status(report: Report) -> Exit:
    if len(report.problems) == report.photos:
        return Exit.FAILED
    return Exit.SOME_FAILED if report.problems else Exit.DONE
