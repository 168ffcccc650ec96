"""`geoengine bench`: a module for each benchmark, registered here."""

from __future__ import annotations

import typer

from geoengine.commands.bench import peers, report, scale, stages, table1
from geoengine.commands.terminal import PlainGroup

app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    help="Measure what the engine costs on this machine, and beside what a user would take instead.",
)
app.command()(stages.stages)
app.command()(table1.table1)
app.command()(peers.peers)
app.command()(scale.scale)
app.command()(report.report)
