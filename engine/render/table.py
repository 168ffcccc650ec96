"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from geoengine.engine.results import DEMO_WORLD, HYPOTHESIS, Location

if TYPE_CHECKING:
    from rich.console import Console


def print_locations(locations: Iterable[Location], file: TextIO, *, width: int | None = None) -> None:
    """Write every result to `file`: the answer, the ranked candidates, the path through the levels.

    Colours only where `file` is a terminal. `width` is in characters; without it lines are as wide as the
    terminal, and practically never wrapped elsewhere.
    """
    from rich.console import Console
    from rich.markup import escape

    if width is None and not file.isatty():
        width = 400
    console = Console(file=file, width=width, highlight=False, emoji=False)
    shown: list[Location] = []
    for location in locations:
        _print_location(console, location)
        shown.append(location)
    for attribution in sorted({location.attribution for location in shown} - {""}):
        console.print(f"Tiles: {escape(printable(attribution))}", style="dim")
    if shown:
        console.print(HYPOTHESIS, style="dim")


def printable(text: str) -> str:
    """Return `text` with all that could steer a terminal, line feeds included, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_point(lat_deg: float, lng_deg: float) -> str:
    """Return "latitude, longitude" with 5 decimals (about a metre), as map sites accept it."""
    return f"{lat_deg:.5f}, {lng_deg:.5f}"


def format_km(km: float) -> str:
    """Return a distance with two or three significant digits and its unit."""
    if km < 1:
        return f"{km * 1000:.0f} m"
    return f"{km:.1f} km" if km < 100 else f"{km:,.0f} km"


def _print_location(console: Console, location: Location) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    world = f"  [{DEMO_WORLD}]" if location.world == "planet" else ""
    console.print(Text.assemble((printable(location.photo), "bold"), (world, "yellow")))
    console.print(
        Text.assemble(
            (format_point(location.point.lat, location.point.lng), "bold green"),
            f"  ± {format_km(location.radius_km)} (uncalibrated)",
        )
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("#", "latitude", "longitude", "score", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("tile", overflow="fold")
    for candidate in location.candidates:
        table.add_row(
            str(candidate.rank),
            f"{candidate.point.lat:.5f}",
            f"{candidate.point.lng:.5f}",
            f"{candidate.score:.3f}",
            f"{candidate.share:.1%}",
            str(candidate.tile),
        )
    console.print(table)
    path = "  ".join(f"z{step.tile.z} {step.score:.3f}" for step in location.candidates[0].path)
    console.print(Text(f"path: {path}"))
    console.print(Text(_search_line(location)))
    if location.exif is not None:
        console.print(Text(_exif_line(location)))
    console.print()


def _search_line(location: Location) -> str:
    scored = sum(level.candidates for level in location.levels)
    missing = sum(level.missing for level in location.levels)
    lacking = f" ({missing} more do not exist there)" if missing else ""
    return (
        f"search: k={location.k}, {scored} tiles of {printable(location.tiles)}{lacking}, "
        f"{printable(location.model)}, {location.seconds:.1f} s"
    )


def _exif_line(location: Location) -> str:
    km = location.exif.distance_km if location.exif else None
    if km is None:
        return "GPS tag: none in this photo"
    if location.world == "planet":
        return f"GPS tag: {format_km(km)} from the answer, which means nothing: the answer is not on Earth"
    return f"GPS tag: {format_km(km)} from the answer"
