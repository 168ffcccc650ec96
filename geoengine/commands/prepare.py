"""`geoengine prepare`: data sets to train with."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.terminal import Exit, PlainGroup, complain, progress_bar, waiting, write_result
from geoengine.commands.tiles import duration, fetch_after_asking
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.extras import require_extra

if TYPE_CHECKING:
    from geoengine.training.mp16.job import PrepareConfig, PrepareJob

app = typer.Typer(cls=PlainGroup, no_args_is_help=True, rich_markup_mode=None)

_SHOWN = 5  # hosts that are named


@app.callback()
def prepare() -> None:
    """Prepare data sets to train with."""


@app.command()
def mp16(
    metadata: Annotated[
        str,
        typer.Argument(
            help="Photos and their places: a .csv, .tsv or .parquet table, WebDataset tars, or a folder.",
            metavar="METADATA",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the data set.", metavar="DIR")],
    urls: Annotated[
        str | None, typer.Option(help="Table of ids and addresses, if METADATA has none.", metavar="FILE")
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photos that are here already.", metavar="DIR")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluation photos, never kept: a folder, a table, or a .txt file of ids; may be repeated.",
            metavar="PHOTOS",
        ),
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(help="Only photos from here: west,south,east,north, a GeoJSON file or a country."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Stop when so many photos are kept.")] = None,
    rate: Annotated[float, typer.Option(help="Requests a second to each host, at most.")] = 5.0,
    side: Annotated[int, typer.Option(help="Shorter side of the kept photos, in pixels.")] = 336,
    shard_size: Annotated[int, typer.Option(help="Photos in a shard.")] = 1000,
    tiles: Annotated[
        str | None,
        typer.Option(help="Then fetch the map tiles of all zooms into DIR/tiles.mbtiles, from this server."),
    ] = None,
    siblings: Annotated[
        bool, typer.Option("--siblings", help="Also the 15 tiles beside each, for hard negatives.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Fetch tiles without asking.")] = False,
) -> None:
    """Fetch a list of photos and put them into shards for training, validation and test, 10:1:1 by uploader.

    The same command goes on after an interruption. Needs the train extra.
    """
    require_extra("train", ("imagehash", "webdataset"), "preparing photos")
    from geoengine.training.mp16.hosts import Politeness
    from geoengine.training.mp16.job import PrepareConfig, PrepareJob

    if tiles is not None and not _can_fetch(tiles, yes):
        tiles = None
    config = PrepareConfig(
        metadata=metadata,
        urls=urls,
        photos=photos,
        held_out=tuple(exclude or ()),
        within=within,
        limit=limit,
        side=side,
        shard_size=shard_size,
        politeness=Politeness(rate_per_s=rate),
    )
    with closing(PrepareJob(config, out)) as job:
        left = _prepare(job, config)
        if tiles is not None:
            _fetch_tiles(job, tiles, out, siblings=siblings, yes=yes)
    write_result(f"{out}\n")
    if left:
        raise typer.Exit(Exit.SOME_FAILED)


def _prepare(job: PrepareJob, config: PrepareConfig) -> int:
    """Run the job and say what came of it; returns how many photos wait for another run."""
    with waiting("reading the list of photos"):
        survey = job.survey()
    rate = config.politeness.rate_per_s
    complain(
        f"{survey.rows} photos listed, {survey.wanted} wanted, {survey.local} of them here; downloads take "
        f"at least {duration(survey.seconds(rate, config.limit))} at {rate:g} a second and host"
    )
    if survey.without_author:
        complain(f"{survey.without_author} photos have no uploader: each is put into a split by itself")
    with waiting("reading the evaluation photos"):
        names, pictures = job.read_held_out()
    if config.held_out:
        complain(f"kept out: {names} names and {pictures} pictures of evaluation photos")
    else:
        complain(
            "no evaluation photos are kept out: name those of IM2GPS, IM2GPS3k and YFCC4k with --exclude"
        )
    start, first = time.monotonic(), None
    with progress_bar("fetching") as show:
        for met in job.run():
            first = met if first is None else first
            rate = (met - first) / max(time.monotonic() - start, 1e-3)
            remaining = f", {duration((survey.wanted - met) / rate)} left" if rate else ""
            show(f"{rate:.1f} photos/s{remaining}", met, survey.wanted)
    with waiting("writing the last shards"):
        left = job.finish()
    counts = ", ".join(f"{count} {outcome}" for outcome, count in job.ledger.outcomes().items())
    complain(f"{counts}; dropped.csv says why")
    for host, reason in list(job.left_alone.items())[:_SHOWN]:
        complain(f"given up for now: {reason if host in reason else f'{host}: {reason}'}")
    if left:
        complain(f"{left} photos wait: run the same command again later")
    return left


def _can_fetch(tiles: str, yes: bool) -> bool:
    """Tell whether there are tiles to fetch; raises now what would else be raised after the photos."""
    from geoengine.engine.sources.description import FilePart
    from geoengine.engine.sources.opening import parts_of
    from geoengine.engine.sources.prefetch import server_of
    from geoengine.engine.tiles import LEVELS

    parts = parts_of(tiles)
    if all(isinstance(part, FilePart) for part in parts):
        complain("the tiles are in a file already, so there are none to fetch")
        return False
    server_of(parts, LEVELS)
    if not yes and not sys.stdin.isatty():
        raise GeoEngineError("nobody is there to agree to the tiles: give --yes to fetch them")
    return True


def _fetch_tiles(job: PrepareJob, tiles: str, out: Path, *, siblings: bool, yes: bool) -> None:
    from geoengine.engine.sources.opening import parts_of
    from geoengine.engine.sources.prefetch import Prefetch
    from geoengine.engine.tiles import LEVELS
    from geoengine.training.mp16.tiles import tiles_of

    places = job.ledger.places()
    if not places:
        raise GeoEngineError("no photo was kept, so there are no tiles to fetch")
    with waiting("counting tiles"):
        prefetch = Prefetch(
            parts_of(tiles), LEVELS, lambda z: tiles_of(places, z, siblings=siblings), out / "tiles.mbtiles"
        )
    fetch_after_asking(prefetch, yes=yes)
