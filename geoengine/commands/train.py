"""`geoengine train` and `geoengine pretrain-planet`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geoengine.commands.levels import parse_levels
from geoengine.commands.options import TilesOption
from geoengine.commands.terminal import progress_bar, write_result
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.extras import require_extra

if TYPE_CHECKING:
    from geoengine.training.photos import Data
    from geoengine.training.recipe import Recipe
    from geoengine.training.start import Start

PLANET = "planet"
_NEEDS = ("train", ("torch", "open_clip", "safetensors"), "training")


def train(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="Folder of shards from geoengine prepare, or planet.")],
    tiles: TilesOption = None,
    recipe: Annotated[str, typer.Option(help="paper or geoengine; what follows changes it.")] = "paper",
    out: Annotated[Path, typer.Option(help="Folder of the run.", metavar="DIR")] = Path("runs/train"),
    model: Annotated[
        str, typer.Option(help="CLIP model to start from, as open_clip names it.")
    ] = "ViT-B-32-quickgelu",
    pretrained: Annotated[
        str, typer.Option(help="Its weights: a tag of open_clip, a file, or none for random ones.")
    ] = "openai",
    start: Annotated[
        Path | None,
        typer.Option(help="Start from the photo encoder of a folder of encoders instead.", metavar="DIR"),
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Zooms to train. Default: all.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times that each photo is seen at each zoom.")] = None,
    batch: Annotated[int | None, typer.Option(help="Photos of a step, over all processes.")] = None,
    validation_batch: Annotated[int | None, typer.Option(help="Photos of a validation batch.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    projection_rate: Annotated[
        float | None, typer.Option(help="How much faster the projection and the temperature learn.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Adam's, decoupled; 0: none.")] = None,
    scale: Annotated[
        float | None, typer.Option(help="Inverse temperature at the start. Default: the starting model's.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="Of the learning rate: constant or cosine.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Parts that a step is computed in, to save memory.")
    ] = None,
    siblings: Annotated[
        int | None, typer.Option(help="Negatives per photo with the parent of its tile.")
    ] = None,
    neighbours: Annotated[int | None, typer.Option(help="Negatives per photo beside its tile.")] = None,
    pool: Annotated[
        int | None, typer.Option(help="Tiles of either kind that a photo's negatives are drawn from.")
    ] = None,
    smoothing: Annotated[
        float | None, typer.Option(help="Reach of targets smoothed by distance, in tile sides; 0: none.")
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(help="Weight of the projection's start in closed form; 0: none.")
    ] = None,
    calibrate: Annotated[
        bool | None, typer.Option(help="Fit each level's temperature on validation photos.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 1,
    precision: Annotated[
        str, typer.Option(help="fp32 or bf16; auto: bf16 where the machine is faster with it.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: a GPU where there is one.")] = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the frozen layers' activations. Default: activations, beside --out.",
            metavar="DIR",
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep no activations, compute them at every step.")
    ] = False,
    sibling_photos: Annotated[
        int, typer.Option(help="Validation photos also scored against their tiles' siblings.")
    ] = 500,
    save_every: Annotated[int, typer.Option(help="Steps between two states to go on from.")] = 200,
    places: Annotated[int, typer.Option(help="Of the planet: photos to train on.")] = 3000,
    validation: Annotated[int, typer.Option(help="Of the planet: photos to validate on.")] = 500,
) -> None:
    """Train the map encoders, finest zoom first, each from the one before; the photo encoder stays as it is.

    Needs the train extra: pip install 'geoengine[train]'. The same command goes on with a run that was
    stopped, and ends with the same weights. Several processes: torchrun --nproc-per-node N --no-python
    geoengine train ... Writes z04.safetensors to z16.safetensors, for build-engines --checkpoints, and
    log.csv; a run with --start writes a folder for build-engines --encoders, too.
    """
    require_extra(*_NEEDS)
    from geoengine.engine.sources import open_source
    from geoengine.engine.tiles import LEVELS
    from geoengine.training.processes import Processes
    from geoengine.training.trainer import TrainConfig, Trainer

    chosen = _recipe(recipe, context.params)
    config = TrainConfig(
        out=out,
        recipe=chosen,
        seed=seed,
        precision=precision,
        cache=None if no_cache else cache or out.parent / "activations",
        sibling_photos=sibling_photos if data == PLANET or chosen.calibrate else 0,
        save_every=save_every,
        levels=LEVELS if levels is None else parse_levels(levels),
    )
    opened = closing(open_source(_tiles(tiles, data)))
    with opened as source, Processes.join(device) as processes, progress_bar("starting") as show:
        begin = _start(data, model, pretrained, start)
        Trainer(
            begin,
            _data(data, begin, places, validation),
            source,
            config,
            processes=processes,
            say=_say if processes.first else _nothing,
            progress=show,
        ).run()
    if processes.first:
        write_result(f"{out}\n")


def pretrain_planet(
    out: Annotated[Path, typer.Option(help="Folder of the encoders.", metavar="DIR")] = Path(
        "runs/planet-start"
    ),
) -> None:
    """Train the demo planet's photo encoder, its stand-in for CLIP, from nothing: 15 minutes on two cores.

    Needs the train extra: pip install 'geoengine[train]'. Writes a folder for geoengine train planet --start,
    and beside it a log of figures (DIR-log.csv).
    """
    require_extra(*_NEEDS)
    from geoengine.training.planet import CsvLog, PlanetPretrainConfig, pretrain_planet

    with CsvLog(out.with_name(f"{out.name}-log.csv")) as log:
        pretrain_planet(out, PlanetPretrainConfig(), log)
    write_result(f"{out}\n")


def _recipe(name: str, options: Mapping[str, Any]) -> Recipe:
    """Return a recipe, changed by the options of the command that are called as its fields."""
    from geoengine.training.recipe import RECIPES, Recipe, Schedule

    if name not in RECIPES:
        raise GeoEngineError(f"there is no recipe {name!r}: choose {' or '.join(RECIPES)}")
    names = [field.name for field in fields(Recipe)]
    given = {key: options[key] for key in names if options.get(key) is not None}
    if "schedule" in given and given["schedule"] not in list(Schedule):
        raise GeoEngineError(f"schedule must be {' or '.join(Schedule)}, got {given['schedule']!r}")
    return replace(RECIPES[name], **given)


def _tiles(tiles: str | None, data: str) -> str:
    if tiles is None and data != PLANET:
        raise GeoEngineError("training needs map tiles: name a source of all zooms with --tiles")
    return tiles or PLANET


def _start(data: str, model: str, pretrained: str, folder: Path | None) -> Start:
    import geoengine.training
    from geoengine.training.start import start_from_clip, start_from_folder

    shipped = Path(geoengine.training.__file__).parent / "weights" / PLANET
    if folder is None and data == PLANET:
        folder = shipped
        if not folder.is_dir():
            raise GeoEngineError(
                "the planet's photo encoder comes with the source, not with the installed package: make one "
                "with geoengine pretrain-planet, and name its folder with --start"
            )
    return start_from_clip(model, pretrained) if folder is None else start_from_folder(folder)


def _data(data: str, start: Start, places: int, validation: int) -> Data:
    from geoengine.training.photos import Geometry, Shards
    from geoengine.training.planet_photos import Planet

    geometry = Geometry(start.encoders.image_size, start.encoders.resize_mode)
    if data == PLANET:
        return Planet(geometry, places=places, validation=validation)
    return Shards(Path(data), geometry, workers=os.cpu_count() or 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _nothing(line: str) -> None:
    """Say nothing: another process speaks."""
