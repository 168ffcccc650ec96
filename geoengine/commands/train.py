"""`geoengine train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geoengine.commands.terminal import write_result
from geoengine.engine.extras import require_extra

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def train() -> None:
    """Train encoders."""


@app.command()
def planet(
    out: Annotated[Path, typer.Option(help="Folder of the encoders.", metavar="DIR")] = Path("runs/planet"),
    pretrained: Annotated[
        Path | None,
        typer.Option(help="Skip the caption regression: start from an earlier run's file.", metavar="FILE"),
    ] = None,
) -> None:
    """Train the encoders of the built-in demo planet, from nothing, in under an hour on two cores.

    Needs the train extra: pip install 'geoengine[train]'. Writes the folder of encoders, and beside it a log
    of figures (DIR-log.csv) and the photo encoder (DIR-pretrained.safetensors).
    """
    require_extra("train", ("torch", "open_clip", "safetensors"), "training")
    from geoengine.engine.render.files import OutputError
    from geoengine.training.planet import CsvLog, PlanetTrainingConfig, train_planet

    if pretrained is not None and not pretrained.is_file():
        raise OutputError(f"{pretrained}: there is no such file")
    try:
        log = CsvLog(out.with_name(f"{out.name}-log.csv"))
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror})") from None
    with log:
        train_planet(out, PlanetTrainingConfig(pretrained=pretrained), log)
    write_result(f"{out}\n")
