"""`geoengine bench scale`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from geoengine.commands.bench.options import DEFAULT_OUT, AgainOption, BundleOption, OutOption
from geoengine.commands.terminal import Exit, complain, progress_bar, write_result
from geoengine.engine.errors import MissingExtraError


class Part(StrEnum):
    """What grows."""

    photos = "photos"
    k = "k"
    rows = "rows"


_Parts = Annotated[
    list[Part] | None, typer.Argument(metavar="[photos|k|rows]…", help="What grows; all by default.")
]
_Seconds = Annotated[
    float, typer.Option(help="Time for each series of one bundle: larger rows are left out.", min=1)
]
_Json = Annotated[bool, typer.Option("--json", help="The results as a JSON object instead of tables.")]


def scale(
    parts: _Parts = None,
    bundle: BundleOption = None,
    seconds: _Seconds = 230.0,
    out: OutOption = DEFAULT_OUT,
    again: AgainOption = False,
    as_json: _Json = False,
) -> None:
    """Measure how cost grows with photos in a call, with the beam width, and with an index's rows."""
    import json
    from dataclasses import asdict

    from geoengine.bench.suite.results import Results, write_plots
    from geoengine.bench.suite.scale import PARTS, ScaleSettings, measure, plots, tables

    wanted = tuple(part for part in PARTS if not parts or Part(part) in parts)
    settings = ScaleSettings(parts=wanted, bundle=bundle, seconds=seconds)
    results = Results.start(out, "scale", asdict(settings), again=again)
    try:
        with progress_bar("measuring") as progress:
            measure(settings, results, progress)
    except KeyboardInterrupt:
        complain(f"interrupted: {results.path} has the finished rows, and the same command goes on there")
        raise typer.Exit(Exit.INTERRUPTED) from None
    results.finish()
    try:
        write_plots(results.path.parent, plots(results.document))
    except MissingExtraError as error:
        complain(f"no plots: {error}")
    complain(f"results: {results.path}")
    text = json.dumps(results.document, indent=1) + "\n" if as_json else tables(results.document)
    write_result(text)
