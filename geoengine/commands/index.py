"""`geoengine index`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.levels import parse_levels
from geoengine.commands.terminal import Rate, complain, progress_bar, waiting, write_result

if TYPE_CHECKING:
    from geoengine.engine.index.tile_index import TileIndex

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_Folder = Annotated[Path, typer.Argument(help="Folder of the index.", metavar="DIR")]


@app.callback()
def index() -> None:
    """Embed tiles before any photo is there: a search scores indexed levels whole, in milliseconds."""


@app.command()
def build(
    zoom: Annotated[str, typer.Option(help="Zooms, such as 4-10 (every second one) or 4,6,8.")] = "4-8",
    land: Annotated[
        bool, typer.Option("--land", help="Only land, without Antarctica, and a margin of one tile.")
    ] = False,
    within: Annotated[
        str | None,
        typer.Option(
            help="Only here: west,south,east,north in degrees, a GeoJSON file, an ISO country code."
        ),
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(help="Engine bundle folder, or planet. Default: as for locate.")
    ] = None,
    tiles: Annotated[
        str | None, typer.Option(help="Map tiles, as for locate. Default for the planet: its own.")
    ] = None,
    backend: Annotated[str, typer.Option(help="As for locate.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="As for locate.")] = None,
    threads: Annotated[int | None, typer.Option(help="Encoder threads. Default: all cores.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the index.", metavar="DIR")] = Path("index"),
) -> None:
    """Embed the tiles of some zooms. An interrupted build goes on with the same command.

    An index belongs to the encoders and to the tiles that it was built with, and is refused for others.
    """
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.index.building import build_index
    from geoengine.engine.regions import parse_region

    zooms = parse_levels(zoom)
    area = None if within is None else parse_region(within)
    with waiting("loading the encoders"):
        engine = GeoEngine.open(bundle, tiles, backend=backend, precision=precision, threads=threads)
    with engine, progress_bar("starting") as show:
        engine.check_region(area, land=land)
        rate = Rate("tiles")
        try:
            built = build_index(
                out,
                engine.bundle,
                engine.source,
                engine.backend,
                zooms=zooms,
                area=area,
                land=land,
                progress=lambda z, done, total: show(f"zoom {z}{rate.text(z, done, total)}", done, total),
            )
        except KeyboardInterrupt:
            complain(f"{out}: the same command goes on with what is done")
            raise
    write_result(_table(built))


@app.command()
def info(folder: _Folder) -> None:
    """Say what an index holds."""
    from geoengine.engine.index.tile_index import TileIndex

    write_result(_table(TileIndex(folder)))


@app.command()
def verify(
    folder: _Folder,
    sample: Annotated[
        int, typer.Option(help="Also embed so many tiles of each zoom again, and compare.")
    ] = 0,
    bundle: Annotated[str | None, typer.Option(help="For --sample: as for build.")] = None,
    tiles: Annotated[str | None, typer.Option(help="For --sample: as for build.")] = None,
) -> None:
    """Read the whole of an index and check that nothing in it is damaged."""
    from geoengine.engine.index.tile_index import TileIndex

    opened = TileIndex(folder)
    segments = [segment for level in opened.segments.values() for segment in level]
    with progress_bar("checking") as show:
        for done, segment in enumerate(segments):
            show(f"checking {segment.path.name}", done, len(segments))
            segment.check()
    text = f"{sum(len(segment.ids) for segment in segments):,} embeddings are sound\n"
    if sample > 0:
        text += _compare(opened, sample, bundle, tiles)
    write_result(_table(opened) + text)


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of indexes.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="New folder for the merged index.", metavar="DIR")],
) -> None:
    """Make one index of several that are of the same encoders and the same tiles."""
    from geoengine.engine.index.building import merge_indexes

    with waiting("merging"):
        merged = merge_indexes(out, folders)
    write_result(_table(merged))


def _compare(opened: TileIndex, count: int, bundle: str | None, tiles: str | None) -> str:
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.index.sampling import compare_sample

    with waiting("loading the encoders"):
        engine = GeoEngine.open(bundle, tiles)
    with engine, waiting("embedding tiles again"):
        opened.check_fits(engine.bundle, engine.source)
        compared, least = compare_sample(opened, engine.source, engine.backend, count)
    return f"{compared:,} tiles embedded again: cosine at least {least:.4f}\n"


def _table(opened: TileIndex) -> str:
    """Return what an index holds, as text."""
    from geoengine.engine.render.table import printable

    description = opened.description
    maker = description.maker
    lines = [
        f"tile index   {opened.path}",
        f"encoders     {maker.model}, {maker.variant} on {maker.backend} ({maker.encoder[:12]})",
        f"tiles        {maker.tiles} ({maker.source[:12]}), {maker.world}",
        f"area         {' and '.join(map(str, description.areas)) or 'tiles met in searches'}",
    ]
    for zoom, segments in sorted(opened.segments.items()):
        rows, missing = sum(len(s.ids) for s in segments), sum(len(s.missing) for s in segments)
        size = sum(segment.path.stat().st_size for segment in segments)
        state = "complete" if zoom in description.complete else "not complete"
        lines.append(f"zoom {zoom:<8}{rows:,} embeddings, {missing:,} tiles missing, {size:,} bytes, {state}")
    return "".join(f"{printable(line)}\n" for line in lines)
