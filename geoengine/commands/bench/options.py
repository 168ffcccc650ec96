"""Options that several benchmarks take: one text for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OutOption = Annotated[
    Path,
    typer.Option(help="Folder of results; this machine's get a folder of its name in it.", metavar="DIR"),
]
AgainOption = Annotated[
    bool, typer.Option("--again", help="Throw away the rows of an interrupted run and start anew.")
]
BundleOption = Annotated[
    str | None,
    typer.Option(
        help="Engine bundle folder, or planet. Default: ViT-B/32 with random weights, built the first time "
        "(some minutes): speed does not depend on what encoders have learnt."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="The results as a JSON object instead of tables.")]
RoundsOption = Annotated[int, typer.Option(help="Rounds, in which all contenders take turns.", min=1)]

DEFAULT_OUT = Path("bench/results")
