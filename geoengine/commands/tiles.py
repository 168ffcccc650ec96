"""`geoengine tiles`: files and caches of map tiles."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.levels import parse_levels
from geoengine.commands.terminal import Exit, PlainGroup, complain, progress_bar, waiting, write_result
from geoengine.engine.errors import GeoEngineError

if TYPE_CHECKING:
    from geoengine.engine.sources.prefetch import Prefetch
    from geoengine.engine.tiles import XyArray

app = typer.Typer(cls=PlainGroup, no_args_is_help=True, help="Look after map tiles and their caches.")

_SHOWN = 10  # damaged tiles that are named


@app.command()
def info(
    source: Annotated[
        str, typer.Argument(help="An .mbtiles file, or a source as --tiles of locate takes it.")
    ],
) -> None:
    """Say what a tile source is: zooms, attribution, terms, and what is kept of it on disk."""
    from geoengine.engine.sources.summary import summary

    write_result("".join(f"{label + ':':<15} {value}\n" for label, value in summary(source)))


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="An MBTiles file, such as a cache.", metavar="FILE.mbtiles")],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Delete damaged tiles from a cache, so that they are fetched again."),
    ] = False,
) -> None:
    """Decode every tile of a file; exit status 1 when something is damaged."""
    from geoengine.engine.sources import upkeep

    with progress_bar("reading") as show:
        verdict = upkeep.verify(file, lambda done, total: show("decoding tiles", done, total))
    for tile in verdict.damaged[:_SHOWN]:
        complain(f"tile {tile} is damaged")
    if verdict.file != "ok":
        complain(f"{file}: the file is damaged ({verdict.file}); delete it and fetch its tiles again")
    if repair and verdict.damaged:
        upkeep.drop_tiles(file, verdict.damaged)
        complain(f"deleted {len(verdict.damaged)} damaged tiles")
    write_result(f"{verdict.tiles} tiles, {len(verdict.damaged)} damaged\n")
    if not verdict.is_whole:
        raise typer.Exit(Exit.SOME_FAILED)


@app.command()
def prune(
    file: Annotated[Path, typer.Argument(help="A cache or pack.", metavar="FILE.mbtiles")],
    to: Annotated[
        str | None, typer.Option("--to", help="Size, such as 500MB, above which the oldest go.")
    ] = None,
    unused_for: Annotated[
        float | None, typer.Option("--unused-for", help="Also delete what was not used for so many days.")
    ] = None,
) -> None:
    """Delete tiles that have expired, and those used longest ago."""
    from geoengine.engine.sources import upkeep
    from geoengine.engine.sources.keeping import parse_size

    with waiting("pruning"):
        deleted, freed = upkeep.prune(
            file,
            limit_bytes=None if to is None else parse_size(to),
            older_than_s=None if unused_for is None else unused_for * 86400,
        )
    write_result(f"{deleted} tiles deleted, {max(0, freed) / 1e6:.1f} MB freed\n")


@app.command()
def fetch(
    tiles: Annotated[str, typer.Option(help="A preset, a .toml description or a URL template.")],
    zoom: Annotated[str, typer.Option(help="Zooms, such as 4,6 or 4-10 (every second one).")],
    out: Annotated[Path, typer.Option(help="The pack to write or go on with.", metavar="PACK.mbtiles")],
    within: Annotated[
        str | None,
        typer.Option(help="Box west,south,east,north, GeoJSON file or country. Default: the world."),
    ] = None,
    land: Annotated[bool, typer.Option("--land", help="Leave out the open sea; zooms to 10.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Start without asking.")] = False,
) -> None:
    """Fetch a region's tiles into a file, after an estimate; the same command goes on after an interruption.

    Only from servers whose description says that their terms allow it.
    """
    from geoengine.engine.render.files import check_writable
    from geoengine.engine.sources.opening import parts_of
    from geoengine.engine.sources.prefetch import Prefetch

    check_writable(out)
    zooms = parse_levels(zoom)
    with waiting("counting tiles"):
        prefetch = Prefetch(parts_of(tiles), zooms, lambda z: _tiles(z, within, land), out)
    fetch_after_asking(prefetch, yes=yes)
    write_result(f"{out}: {prefetch.total} tiles, {out.stat().st_size / 1e6:.1f} MB\n")


def fetch_after_asking(prefetch: Prefetch, *, yes: bool) -> None:
    """Say how much there is to fetch and under which terms, ask unless `yes`, and fetch it."""
    with waiting("fetching a few tiles for the estimate"):
        estimate = prefetch.estimate()
    left = estimate.tiles - estimate.known
    complain(
        f"{estimate.tiles} tiles, {left} to fetch: about {estimate.bytes / 1e6:.1f} MB "
        f"and {duration(estimate.seconds)}"
    )
    for label, text in (("terms", prefetch.description.terms), ("credit", prefetch.description.attribution)):
        if text:
            complain(f"{label}: {text}")
    if left and not yes:
        _ask()
    _run(prefetch)


def _tiles(z: int, within: str | None, land: bool) -> XyArray:
    from geoengine.engine.regions import parse_region
    from geoengine.engine.regions.countries import Land
    from geoengine.engine.tiles import all_xy

    if within is None:
        return Land().tiles(z) if land else all_xy(z)
    xy = parse_region(within).tiles(z)
    return xy[Land().intersects(z, xy)] if land else xy


def _ask() -> None:
    if not sys.stdin.isatty():
        raise GeoEngineError("nobody is there to agree: give --yes to fetch these tiles")
    if not typer.confirm("Fetch them?", err=True):
        raise typer.Exit(Exit.DONE)


def _run(prefetch: Prefetch) -> None:
    start, first = time.monotonic(), None
    with progress_bar("fetching") as show:
        for zoom, done in prefetch.run():
            first = done if first is None else first
            rate = (done - first) / max(time.monotonic() - start, 1e-3)
            left = f", {duration((prefetch.total - done) / rate)} left" if rate else ""
            show(f"zoom {zoom}, {rate:.0f} tiles/s{left}", done, prefetch.total)


def duration(seconds: float) -> str:
    """Return a duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
