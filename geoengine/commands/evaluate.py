"""`geoengine evaluate`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.terminal import progress_bar, write_result

if TYPE_CHECKING:
    from geoengine.bench.evaluate import Report

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def evaluate() -> None:
    """Measure how accurate the search is."""


@app.command()
def planet(
    k: Annotated[list[int], typer.Option("--k", help="Beam width; may be given several times.")] = [1, 4, 16],  # noqa: B006
    photos: Annotated[int, typer.Option(help="Photos of random places on land.")] = 200,
    seed: Annotated[int, typer.Option(help="The same seed gives the same places and photos.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object instead of a table.")] = False,
) -> None:
    """Locate photos of the built-in demo planet, whose truth is known, and report how far off they are."""
    from geoengine.bench.evaluate import evaluate_planet

    with progress_bar("drawing the photos") as show:
        report = evaluate_planet(
            photos=photos, ks=k, seed=seed, progress=lambda done, total: show("photos located", done, total)
        )
    write_result(json.dumps(report.to_dict(), indent=2) + "\n" if as_json else report_table(report))


def report_table(report: Report) -> str:
    """Return the figures of an evaluation as tables for a terminal."""
    from rich import box
    from rich.table import Table

    from geoengine.engine.render.table import text_of
    from geoengine.engine.results import DEMO_WORLD

    def table(title: str, first: str, headings: list[str]) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in (first, *headings):
            made.add_column(heading, justify="right", no_wrap=True)
        return made

    distances = [f"{km:g} km" for km in report.beams[0].accuracy.within_km]
    zooms = [f"z{zoom}" for zoom in report.beams[0].recall]
    title = f"{DEMO_WORLD}: {report.photos} photos, seed {report.seed}, {report.model}, {report.backend}"
    placed = table(f"{title}\nphotos placed within", "k", [*distances, "median", "s/photo", "tiles/s"])
    kept = table("true tile in the beam", "k", zooms)
    for beam in report.beams:
        within = beam.accuracy.within_km.values()
        placed.add_row(
            str(beam.k),
            *(f"{share.value:.1%}" for share in within),
            f"{beam.accuracy.median_km:.1f} km",
            f"{beam.seconds_per_photo:.2f}",
            f"{beam.tiles_per_second:.0f}",
        )
        kept.add_row(str(beam.k), *(f"{share.value:.1%}" for share in beam.recall.values()))
    return text_of([placed, kept], sys.stdout)
