"""Results as tables for a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

from geoengine.engine.results import DEMO_WORLD, HYPOTHESIS, Location

if TYPE_CHECKING:
    from rich.console import RenderableType


def table_text(locations: Iterable[Location], terminal: TextIO) -> str:
    """Return every result as text: the answer, the ranked candidates, the path through the levels.

    Colours and line breaks suit `terminal`, as `text_of` says.
    """
    from rich.text import Text

    shown = list(locations)
    parts = [part for location in shown for part in _location_parts(location)]
    for attribution in sorted({location.attribution for location in shown} - {""}):
        parts.append(Text(f"Tiles: {printable(attribution)}", style="dim"))
    if shown:
        parts.append(Text(HYPOTHESIS, style="dim"))
    return text_of(parts, terminal)


def text_of(parts: Iterable[RenderableType], terminal: TextIO) -> str:
    """Return what rich would print to `terminal`, with colours and the terminal's width if it is one.

    Elsewhere lines are practically never wrapped. Nothing is written.
    """
    from rich.console import Console

    width = None if terminal.isatty() else 400
    like = Console(file=terminal, width=width)  # knows the terminal; what it captures it would also flush
    page = _Page(like.encoding)
    console = Console(
        file=page,
        width=like.width,
        force_terminal=like.is_terminal,
        color_system=like.color_system,  # type: ignore[arg-type]  # rich types its own answer as str
        highlight=False,
        emoji=False,
    )
    for part in parts:
        console.print(part)
    return page.getvalue()


class _Page(io.StringIO):
    """Text in memory that says to have a terminal's encoding, by which rich chooses its line drawing."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only, as that of a file
        return self._encoding


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


def radius_remark(location: Location) -> str:
    """Return what an answer's radius says of the truth, in a few words."""
    return f"{location.radius_share:.0%} radius" if location.radius_calibrated else "uncalibrated"


def _location_parts(location: Location) -> Iterator[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    world = f"  [{DEMO_WORLD}]" if location.world == "planet" else ""
    yield Text.assemble((printable(location.photo), "bold"), (world, "yellow"))
    yield Text.assemble(
        (format_point(location.point.lat, location.point.lng), "bold green"),
        f"  ± {format_km(location.radius_km)} ({radius_remark(location)})",
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("#", "latitude", "longitude", "score", "share", "tile"):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in location.candidates:
        table.add_row(
            str(candidate.rank),
            f"{candidate.point.lat:.5f}",
            f"{candidate.point.lng:.5f}",
            f"{candidate.score:.3f}",
            f"{candidate.share:.1%}",
            str(candidate.tile),
        )
    yield table
    if location.levels:
        yield Text(
            "path: " + "  ".join(f"z{step.tile.z} {step.score:.3f}" for step in location.candidates[0].path)
        )
    yield Text(_search_line(location))
    for remark in _remarks(location):
        yield Text(remark)
    if location.exif is not None:
        yield Text(_exif_line(location))
    yield Text("")


def _search_line(location: Location) -> str:
    scored = sum(level.candidates for level in location.levels)
    missing = sum(level.missing for level in location.levels)
    lacking = f" ({missing} more do not exist there)" if missing else ""
    within = f" within {printable(location.within)}" if location.within else ""
    if not location.levels:
        return f"gallery{within}: no map tiles, {printable(location.model)}, {location.seconds:.1f} s a photo"
    absent = ", ".join(map(str, location.left_out))
    without = f", without zoom {absent}, which it does not have" if absent else ""
    return (
        f"search{within}: k={location.k}, {_scoring(location)}, "
        f"{scored} tiles of {printable(location.tiles)}{lacking}{without}, "
        f"{printable(location.model)}, {location.seconds:.1f} s"
    )


def _scoring(location: Location) -> str:
    used = location.scoring
    parts = [] if used.method == "tiles" else [f"method {used.method}"]
    parts += [f"{used.score} score" + ("" if used.calibrated or used.score == "paper" else " (uncalibrated)")]
    parts += ["centred"] if used.centred else []
    parts += [f"quota {used.quota}"] if used.quota is not None else []
    parts += [f"answer for {used.objective}"] if used.objective != "best-tile" else []
    parts += [f"prior {printable(used.prior)}"] if used.prior else []
    return ", ".join(parts)


def _remarks(location: Location) -> Iterator[str]:
    """Yield what a reader must know of how the levels were searched."""
    whole = ", ".join(str(level.zoom) for level in location.levels if level.exhaustive)
    if whole:
        yield f"all tiles of zoom {whole} were scored from the index"
    late = ", ".join(f"{level.late} of zoom {level.zoom}" for level in location.levels if level.late)
    if late:
        yield f"tiles that came too late and were not scored: {late}"
    enlarged = ", ".join(
        f"{level.enlarged} of zoom {level.zoom}" for level in location.levels if level.enlarged
    )
    if enlarged:
        yield f"tiles enlarged from coarser ones: {enlarged}"


def _exif_line(location: Location) -> str:
    km = location.exif.distance_km if location.exif else None
    if km is None:
        return "GPS tag: none in this photo"
    if location.world == "planet":
        return f"GPS tag: {format_km(km)} from the answer, which means nothing: the answer is not on Earth"
    return f"GPS tag: {format_km(km)} from the answer"
