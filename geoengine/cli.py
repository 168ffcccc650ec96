"""The command line: `geoengine`."""

from __future__ import annotations

from typing import Annotated

import typer

from geoengine.commands import (
    bench,
    build_engines,
    calibrate,
    doctor,
    evaluate,
    index,
    locate,
    prepare,
    prior,
    serve,
    tiles,
    train,
)
from geoengine.commands.terminal import PlainGroup

app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help takes 0.1 s, with rich it takes 0.25 s
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find where on Earth a photograph was taken: a hierarchical search over map tiles.",
)
app.command()(locate.locate)
app.command()(build_engines.build_engines)
app.command()(calibrate.calibrate)
app.command()(prior.prior)
app.command()(doctor.doctor)
app.command()(serve.serve)
app.add_typer(index.app, name="index")
app.command()(evaluate.evaluate)
app.add_typer(bench.app, name="bench")
app.add_typer(tiles.app, name="tiles")
app.add_typer(prepare.app, name="prepare")
app.command()(train.train)
app.command()(train.pretrain_planet)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"geoengine {version('geoengine')}")
        raise typer.Exit()


@app.callback()
def geoengine(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find where on Earth a photograph was taken: a hierarchical search over map tiles."""


def main() -> None:
    """Run the command line; the entry point of the `geoengine` script."""
    app()
