"""`geoengine index`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.levels import parse_levels
from geoengine.commands.options import (
    BackendOption,
    BundleOption,
    PrecisionOption,
    RayOption,
    ThreadsOption,
    TilesOption,
    WithinOption,
    WorkersOption,
)
from geoengine.commands.orders import ClusterOrder, EngineOrder
from geoengine.commands.terminal import Rate, complain, progress_bar, waiting, write_result
from geoengine.engine.scoring.kinds import Method

if TYPE_CHECKING:
    from geoengine.engine.bulk.engines import EngineSpec
    from geoengine.engine.cluster import Cluster
    from geoengine.engine.engine import GeoEngine
    from geoengine.engine.index.building import Embed
    from geoengine.engine.index.tile_index import TileIndex
    from geoengine.engine.regions import Region

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
    within: WithinOption = None,
    bundle: BundleOption = None,
    tiles: TilesOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    out: Annotated[Path, typer.Option(help="Folder of the index.", metavar="DIR")] = Path("index"),
    ray: RayOption = None,
    workers: WorkersOption = None,
) -> None:
    """Embed the tiles of some zooms. An interrupted build goes on with the same command.

    An index belongs to the encoders and to the tiles that it was built with, and is refused for others.
    """
    from geoengine.engine.regions import parse_region

    zooms = parse_levels(zoom)
    area = None if within is None else parse_region(within)
    cluster_order = ClusterOrder.parse(ray, workers, threads)
    order = EngineOrder.parse(False, bundle, tiles, None, backend, precision, threads, Method.tiles)
    spec = dataclasses.replace(order.spec(), keeps_rows=False)
    with contextlib.ExitStack() as stack:
        cluster = None if cluster_order is None else stack.enter_context(cluster_order.open())
        with waiting("loading the encoders"):
            engine = stack.enter_context(spec.open())
        engine.check_region(area, land=land)
        built = _build(out, engine, zooms, area, land, _elsewhere(out, engine, spec, cluster))
    write_result(_table(built))


def _elsewhere(out: Path, engine: GeoEngine, spec: EngineSpec, cluster: Cluster | None) -> Embed | None:
    """Return what embeds tiles on a cluster, if there is one."""
    if cluster is None:
        return None
    from geoengine.engine.index.spread import SpreadEmbedder
    from geoengine.engine.index.tile_index import Maker

    maker = Maker.of(engine.bundle, engine.source, engine.backend)
    return SpreadEmbedder.of(cluster, spec, out, maker).embed


def _build(
    out: Path,
    engine: GeoEngine,
    zooms: tuple[int, ...],
    area: Region | None,
    land: bool,
    elsewhere: Embed | None,
) -> TileIndex:
    from geoengine.engine.index.building import build_index

    rate = Rate("tiles")
    with progress_bar("starting") as show:
        try:
            return build_index(
                out,
                engine.bundle,
                engine.source,
                engine.backend,
                zooms=zooms,
                area=area,
                land=land,
                progress=lambda z, done, total: show(f"zoom {z}{rate.text(z, done, total)}", done, total),
                elsewhere=elsewhere,
            )
        except KeyboardInterrupt:
            complain(f"{out}: the same command goes on with what is done")
            raise


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
