"""`geoengine bench peers`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from geoengine.bench.suite.peers_part import Part
from geoengine.commands.bench.options import DEFAULT_OUT, AgainOption, OutOption, RoundsOption
from geoengine.commands.terminal import Exit, complain, progress_bar, write_result


def peers(
    part: Annotated[Part, typer.Argument(help="What to compare.")] = Part.both,
    batch: Annotated[int, typer.Option(help="Pictures in a call.", min=16, max=4096)] = 32,
    rounds: RoundsOption = 5,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Ours to compare; repeatable. Default: those for this machine's GPU, or CPU."),
    ] = None,
    fastembed: Annotated[
        str | None,
        typer.Option(help="A Python that has fastembed, in an environment of its own.", metavar="PYTHON"),
    ] = None,
    out: OutOption = DEFAULT_OUT,
    again: AgainOption = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the results file, not tables.")] = False,
) -> None:
    """Compare our encoders and scoring with the libraries that a user would take: speed and accuracy.

    Encoders are ViT-B/32 with random weights, so nothing is downloaded; comparing them needs the export
    extra. Peers that are not installed get a row that says how to install them. Takes minutes on two cores.
    """
    from geoengine.bench.suite import peers as suite
    from geoengine.bench.suite.machine import gpu_name
    from geoengine.bench.suite.results import Results

    settings = suite.PeersSettings(
        part=part,
        batch=batch,
        rounds=rounds,
        backends=tuple(backend or suite.default_backends(gpu=gpu_name() is not None)),
        fastembed=fastembed,
    )
    suite.check(settings)
    results = Results.start(out, part.benchmark, suite.settings_json(settings), again=again)
    try:
        with progress_bar("starting") as show:
            suite.measure(settings, results, lambda done, total, what: show(what, done, total))
    except KeyboardInterrupt:
        complain(
            f"interrupted: {len(results.document['rows'])} rows are kept in {results.path}; "
            "the same command goes on, and --again starts anew"
        )
        raise typer.Exit(Exit.INTERRUPTED) from None
    write_result(json.dumps(results.document, indent=1) + "\n" if json_ else suite.tables(results.document))
