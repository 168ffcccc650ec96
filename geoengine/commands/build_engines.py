"""`geoengine build-engines`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.levels import parse_levels
from geoengine.commands.terminal import complain, progress_bar, write_result
from geoengine.engine.errors import GeoEngineError

if TYPE_CHECKING:
    from geoengine.export.check import Progress
    from geoengine.export.config import BuildConfig
    from geoengine.export.report import BuildReport


def build_engines(
    model: Annotated[str, typer.Option(help="CLIP model, as open_clip names it.")] = "ViT-B-32-quickgelu",
    pretrained: Annotated[
        str, typer.Option(help="Weights: a tag of open_clip, a file, or none for random ones.")
    ] = "openai",
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder of fine-tuned map encoders.", metavar="DIR")
    ] = None,
    encoders: Annotated[
        Path | None, typer.Option(help="Folder of encoders that the trainer wrote.", metavar="DIR")
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Zooms with a map encoder. Default: all.")] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32, fp16 (GPUs) or int8 (CPUs); repeatable. Default: what --backend needs."),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="What will run it: tensorrt, onnxruntime-cuda, openvino, onnxruntime-cpu.")
    ] = "auto",
    max_batch: Annotated[int, typer.Option(help="Largest batch of TensorRT's plans.")] = 1024,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Pictures to take int8's ranges from. Default: made ones.", metavar="DIR"),
    ] = None,
    geoclip: Annotated[
        bool, typer.Option("--geoclip", help="Export GeoCLIP alone, into the bundle in --out or a new one.")
    ] = False,
    geoclip_clip: Annotated[
        str,
        typer.Option(help="Weights of GeoCLIP's CLIP ViT-L/14: openai, a file, or none for random ones."),
    ] = "openai",
    out: Annotated[Path, typer.Option(help="Folder of the bundle.", metavar="DIR")] = Path("engines"),
    verify: Annotated[
        bool, typer.Option("--verify", help="Build nothing: check the bundle in --out.")
    ] = False,
    plans: Annotated[
        bool, typer.Option("--plans", help="Export nothing: compile the bundle in --out with TensorRT.")
    ] = False,
) -> None:
    """Export CLIP encoders into an engine bundle, and check that it agrees with PyTorch.

    Needs the export extra: pip install 'geoengine[export]'; --geoclip needs 'geoengine[geoclip]'. An existing
    bundle is replaced only after the new one has passed every check, and GeoCLIP in it is kept. The same
    command goes on with a build that was interrupted.
    """
    from geoengine.export.build import build_engines
    from geoengine.export.check import compile_bundle, verify_bundle
    from geoengine.export.config import BuildConfig

    if geoclip and (checkpoints is not None or encoders is not None or levels is not None):
        raise GeoEngineError(
            "--geoclip exports nothing but GeoCLIP, which has no levels, checkpoints or encoders of its own: "
            "leave those out, or give them in a command without --geoclip"
        )
    with progress_bar("starting") as show:

        def progress(done: int, total: int, following: str) -> None:
            show(following, done, total or None)

        if verify:
            report = verify_bundle(out, progress=progress)
        elif plans:
            report = compile_bundle(out, max_batch=max_batch, progress=progress)
        else:
            config = BuildConfig(
                model=model,
                pretrained=pretrained,
                checkpoints=checkpoints,
                encoder_folder=encoders,
                levels=None if levels is None else parse_levels(levels),
                precisions=None if precision is None else tuple(precision),
                backend=backend,
                max_batch=max_batch,
                calibration=calibration,
                out=out,
            )
            try:
                report = (
                    _build_geoclip(config, geoclip_clip, progress)
                    if geoclip
                    else build_engines(config, progress)
                )
            except KeyboardInterrupt as interrupt:
                complain(str(interrupt) or "the same command goes on with this build")
                raise
    write_result(report_table(report))
    if report.random:
        complain("the weights are random: this bundle is good for measuring speed, and for nothing else")


def _build_geoclip(config: BuildConfig, clip: str, progress: Progress) -> BuildReport:
    from geoengine.engine.extras import require_extra
    from geoengine.export.build import NEEDED

    require_extra("geoclip", NEEDED, "adding GeoCLIP")
    from geoengine.export.geoclip import build_geoclip

    return build_geoclip(config, clip, progress)


def report_table(report: BuildReport) -> str:
    """Return what was built or verified as a table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from geoengine.engine.render.table import printable, text_of

    title = (
        f"{printable(str(report.path))}: {report.model}/{report.pretrained}, world {report.world}, "
        f"{report.bytes / 1e6:.1f} MB, {report.seconds:.0f} s"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("graph", no_wrap=True)
    table.add_column("run by", no_wrap=True)
    for heading in ("min cosine", "mean cosine", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            printable(row.artifact),
            row.backend,
            f"{row.min_cosine:.6f}",
            f"{row.mean_cosine:.6f}",
            f"{row.images_per_second:.1f}",
        )
    skipped = [Text(printable(f"not run by {name}: {reason}")) for name, reason in report.skipped]
    return text_of([table, *skipped], sys.stdout)
