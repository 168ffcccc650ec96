"""`geoengine bench report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from geoengine.commands.bench.options import DEFAULT_OUT, JsonOption
from geoengine.commands.terminal import Exit, complain, write_result


def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help=f"Folders of results, of one machine or with folders of machines. Default: {DEFAULT_OUT}",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write it to FILE.md, or to README.md in a folder, with the plots beside it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the results of all machines and benchmarks side by side.

    Exit status: 0 all shown, 1 something could not be shown, 2 nothing could.
    """
    from geoengine.bench.suite import report as suite

    folders = folders or [DEFAULT_OUT]
    found = suite.collect(folders)
    if not found.documents:
        nothing = f"{', '.join(map(str, folders))}: no results; `geoengine bench table1` makes some"
        for trouble in found.troubles or [nothing]:
            complain(trouble)
        raise typer.Exit(Exit.FAILED)
    if as_json:
        write_result(json.dumps(suite.as_json(found), indent=1) + "\n")
    elif out is not None:
        write_result(f"{suite.write(found, out)}\n")
    else:
        write_result(suite.render(found)[0])
    for trouble in found.troubles:
        complain(trouble)
    if found.troubles:
        raise typer.Exit(Exit.SOME_FAILED)
