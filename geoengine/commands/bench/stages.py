"""`geoengine bench stages`."""

from __future__ import annotations

from typing import Annotated

import typer

from geoengine.commands.bench.options import (
    DEFAULT_OUT,
    AgainOption,
    BundleOption,
    JsonOption,
    OutOption,
    RoundsOption,
)
from geoengine.commands.bench.running import run
from geoengine.commands.options import KOption, PrecisionOption, TilesOption

_Backends = Annotated[
    list[str],
    typer.Option(
        "--backend",
        help="tensorrt, onnxruntime-cuda, openvino, onnxruntime-cpu; several times for several; auto: the "
        "first to run; all: each that runs here.",
    ),
]


def stages(
    k: KOption = 16,
    backend: _Backends = ["all"],  # noqa: B006
    precision: PrecisionOption = None,
    bundle: BundleOption = None,
    tiles: TilesOption = None,
    rounds: RoundsOption = 3,
    out: OutOption = DEFAULT_OUT,
    again: AgainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time each stage of a search, beside this machine's limit.

    One photo is located with nothing known. Tables go to stdout, and the results with a waterfall for each
    backend to the folder of results.
    """
    from geoengine.bench.suite import stages as suite

    settings = suite.StageSettings(
        k=k, backends=tuple(backend), precision=precision, bundle=bundle, tiles=tiles, rounds=rounds
    )
    run(suite, settings, out=out, again=again, as_json=as_json)
