"""`geoengine bench peers`."""

from __future__ import annotations

from typing import Annotated

import typer

from geoengine.bench.suite.peers_part import Part
from geoengine.commands.bench.options import DEFAULT_OUT, AgainOption, JsonOption, OutOption, RoundsOption
from geoengine.commands.bench.running import run


def peers(
    part: Annotated[Part, typer.Argument(metavar="PART", help="What to compare.")] = Part.both,
    batch: Annotated[int, typer.Option(help="Pictures in a call.", min=16, max=4096)] = 32,
    rounds: RoundsOption = 5,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="tensorrt, onnxruntime-cuda, openvino, onnxruntime-cpu; several times for several. Default: "
            "those for this machine's GPU, or CPU."
        ),
    ] = None,
    fastembed: Annotated[
        str | None,
        typer.Option(help="A Python that has fastembed, in an environment of its own.", metavar="PYTHON"),
    ] = None,
    out: OutOption = DEFAULT_OUT,
    again: AgainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare encoders and scoring with other libraries.

    Speed and accuracy, ours beside those of what a user would take instead. Encoders are ViT-B/32 with random
    weights, so nothing is downloaded; comparing them needs the export extra. Peers that are not installed get
    a row that says how to install them. Takes minutes on two cores.
    """
    from geoengine.bench.suite import peers as suite
    from geoengine.bench.suite.machine import gpu_name

    settings = suite.PeersSettings(
        part=part,
        batch=batch,
        rounds=rounds,
        backends=tuple(backend or suite.default_backends(gpu=gpu_name() is not None)),
        fastembed=fastembed,
    )
    suite.check(settings)
    run(suite, settings, out=out, again=again, as_json=as_json)
