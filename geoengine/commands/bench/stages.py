"""`geoengine bench stages`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from geoengine.commands.bench.options import DEFAULT_OUT, AgainOption, BundleOption, OutOption, RoundsOption
from geoengine.commands.options import KOption, PrecisionOption, TilesOption
from geoengine.commands.terminal import Exit, complain, progress_bar, write_result

_Backends = Annotated[
    list[str],
    typer.Option(
        "--backend",
        help="tensorrt, onnxruntime-cuda, openvino, onnxruntime-cpu; several times for several; auto: the "
        "first to run; all: each that runs here.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="The results as a JSON object instead of tables.")]


def stages(
    k: KOption = 16,
    backend: _Backends = ["all"],  # noqa: B006
    precision: PrecisionOption = None,
    bundle: BundleOption = None,
    tiles: TilesOption = None,
    rounds: RoundsOption = 3,
    out: OutOption = DEFAULT_OUT,
    again: AgainOption = False,
    as_json: _Json = False,
) -> None:
    """Time each stage of a search for one photo, beside what this machine could do at best.

    Tables go to stdout, and the results with a waterfall for each backend to the folder of results.
    """
    from geoengine.bench.suite.results import Results, write_plots
    from geoengine.bench.suite.stages import StageSettings, measure, plots, tables

    settings = StageSettings(
        k=k, backends=tuple(backend), precision=precision, bundle=bundle, tiles=tiles, rounds=rounds
    )
    results = Results.start(out, "stages", asdict(settings), again=again)
    try:
        with progress_bar("stages") as show:
            measure(settings, results, show)
    except KeyboardInterrupt:
        complain(f"interrupted: finished backends are in {results.path}, and the same command goes on")
        raise typer.Exit(Exit.INTERRUPTED) from None
    write_plots(results.path.parent, plots(results.document))
    document = results.document
    write_result(json.dumps(document, indent=1) + "\n" if as_json else tables(document))
    complain(f"results in {results.path}")
