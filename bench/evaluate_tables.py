"""The figures of an evaluation as tables, for a terminal and in Markdown, beside published ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from geoengine.bench.accuracy import THRESHOLDS_KM, Share
from geoengine.bench.evaluate_report import GEODESIC, HAVERSINE, Report, SettingFigures
from geoengine.bench.evaluate_rows import Setting
from geoengine.bench.published import Published, of_table, published
from geoengine.bench.readme import percent, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_DISTANCES = [f"{km:,g} km" for km in THRESHOLDS_KM]
_SET_TITLES = {"im2gps": "IM2GPS", "im2gps3k": "IM2GPS3k", "yfcc4k": "YFCC4k"}
_SHOWN_SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: its title, its column headings, its rows of cells, and notes below it.

    The first `keys` columns say what a row is of.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()
    keys: int = 2


def sheets(report: Report) -> list[Sheet]:
    """Return all tables of a report in the order of reading."""
    found = [_placed(report), _costs(report)]
    if any(figures.recall for figures in report.results):
        found.append(_recall(report))
    if any(figures.calibration for figures in report.results):
        found.append(_calibration(report))
    return [*found, _table_1(report), _table_2(report), _table_3(report)]


def terminal_text(report: Report, terminal: TextIO) -> str:
    """Return the tables as text for a terminal, or for a file in the same form without line breaks."""
    from rich.text import Text

    from geoengine.engine.render.table import printable, text_of

    width = shutil.get_terminal_size().columns if terminal.isatty() else None
    parts: list[RenderableType] = [Text(printable(line)) for line in heading(report)]
    for sheet in sheets(report):
        parts.append(Text(f"\n{sheet.title}", style="bold"))
        parts += [_rich(part) for part in fitted(sheet, width)]
        parts += [Text(printable(note), style="dim") for note in sheet.notes]
    return text_of(parts, terminal)


def fitted(sheet: Sheet, width: int | None) -> list[Sheet]:
    """Return a table in parts that fit into `width` columns of text, None for any; cells may have line feeds.

    A table that does not fit has the columns that name a row in one, intervals below their shares, and the
    columns that are left over in further tables.
    """
    if width is None or _width(zip(sheet.header, *sheet.rows, strict=True)) <= width:
        return [sheet]
    lines = (sheet.header, *sheet.rows)
    heads = ["\n".join(part for part in line[: sheet.keys] if part) for line in lines]
    columns = [[cell.replace(" (", "\n(") for cell in column] for column in zip(*lines, strict=True)]
    parts: list[list[list[str]]] = []
    for column in columns[sheet.keys :]:
        if not parts or _width([heads, *parts[-1], column]) > width:
            parts.append([])
        parts[-1].append(column)
    made = ([list(line) for line in zip(heads, *part, strict=True)] for part in parts)
    return [Sheet(sheet.title, header, rows, keys=1) for header, *rows in made]


def _width(columns: Iterable[Sequence[str]]) -> int:
    """Return how wide a table of these columns of cells is on a terminal."""
    return sum(3 + max(len(line) for cell in column for line in cell.split("\n")) for column in columns)


def _rich(sheet: Sheet) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from geoengine.engine.render.table import printable

    def text(cell: str) -> Text:
        return Text("\n".join(map(printable, cell.split("\n"))))

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(sheet.header):
        made.add_column(text(name), justify="left" if number == 0 else "right", no_wrap=True)
    for row in sheet.rows:
        made.add_row(*map(text, row))
    return made


def markdown(report: Report) -> str:
    """Return the tables as Markdown."""
    parts = list(heading(report))
    for sheet in sheets(report):
        rows = [[cell.replace("|", "\\|") for cell in row] for row in sheet.rows]
        parts += [f"## {sheet.title}", table(sheet.header, rows).strip(), *sheet.notes]
    return "\n\n".join(parts) + "\n"


def heading(report: Report) -> Iterator[str]:
    """Yield what was evaluated with what, one sentence each."""
    of = "" if report.wanted in (None, report.photos) else f" of {report.wanted}"
    yield f"{report.title}: n = {report.photos}{of} photos"
    tiles = f" Tiles: {report.tiles}." if report.tiles else ""
    yield f"Encoders: {report.model}, {report.backend}.{tiles}"
    unit = GEODESIC if report.geodesic else HAVERSINE
    yield f"Distances: {unit}; a photo at exactly a distance counts. Intervals: Wilson, 95 %."
    if report.problems:
        yield f"{len(report.problems)} photos could not be read and count as misses."
    yield from (f"{remark[0].upper()}{remark[1:]}." for remark in report.remarks)
    if report.attribution:
        yield f"Tiles by {report.attribution}"


def label(setting: Setting) -> str:
    """Return what tables and plots call a setting."""
    if setting.method == "geoclip":
        return "GeoCLIP alone"
    method = "" if setting.method == "tiles" else f"{setting.method}, "
    return f"{method}{setting.score} score, k={setting.k}"


def _placed(report: Report) -> Sheet:
    rows = [
        [label(figures.setting), str(figures.accuracy.photos), *map(_interval, _within(figures))]
        for figures in report.results
    ]
    return Sheet("Photos placed within", ["search", "n", *_DISTANCES], rows)


def _costs(report: Report) -> Sheet:
    header = [
        "search",
        "n",
        "median error",
        "mean error",
        "GeoScore",
        "time a photo",
        "tiles a photo",
        "coverage",
    ]
    rows = [
        [
            label(figures.setting),
            str(figures.accuracy.photos),
            _km(figures.accuracy.median_km),
            _km(figures.accuracy.mean_km),
            f"{figures.accuracy.geoscore:.0f}",
            _seconds(figures.seconds_per_photo),
            _number(figures.tiles_per_photo, ".0f"),
            _number(figures.coverage, ".1%"),
        ]
        for figures in report.results
    ]
    note = f"Times are wall time with {report.together} photos located together"
    reused = (
        " Embeddings of tiles met before were reused: a first search takes longer." if report.reused else ""
    )
    missing = " The mean error is over the photos that could be read." if report.problems else ""
    return Sheet("Errors and cost", header, rows, (f"{note}, which share their tiles.{reused}{missing}",))


def _recall(report: Report) -> Sheet:
    zooms = sorted({zoom for figures in report.results for zoom in figures.recall})
    rows = [
        [
            label(figures.setting),
            str(figures.accuracy.photos),
            *(_interval(figures.recall[zoom]) if zoom in figures.recall else "" for zoom in zooms),
        ]
        for figures in report.results
    ]
    return Sheet("True tile in the beam", ["search", "n", *(f"zoom {zoom}" for zoom in zooms)], rows)


def _calibration(report: Report) -> Sheet:
    known = {share for figures in report.results for share in figures.calibration}
    shares = [share for share in _SHOWN_SHARES if share in known]
    rows = []
    for figures in report.results:
        inside = [figures.calibration[share] for share in shares if share in figures.calibration]
        if inside:
            fitted = "" if figures.calibrated else " (not calibrated)"
            name = f"{label(figures.setting)}{fitted}"
            rows.append([name, str(inside[0].total), *map(_interval, inside)])
    header = ["search", "n", *(f"{share:.0%}" for share in shares)]
    note = "Calibrated are radii in which as many of the photos lie as the heading of the column says."
    return Sheet("Photos inside the radius that is said to hold", header, rows, (note,))


def _table_1(report: Report) -> Sheet:
    header = ["method", "figures", "photos of", "n", *_DISTANCES, "time a photo"]
    theirs = [row for row in published() if 1 in row.tables]
    rows = [[*_published(row), _seconds(row.seconds_per_photo)] for row in theirs]
    ours = [figures for figures in report.results if figures.setting.method == "tiles"]
    rows += [[*_measured(report, figures), _seconds(figures.seconds_per_photo)] for figures in ours]
    return Sheet(
        "Table 1 of the paper: beam width, accuracy and time", header, rows, _notes(theirs, report), keys=4
    )


def _table_2(report: Report) -> Sheet:
    header = ["method", "figures", "photos of", "n", *_DISTANCES]
    theirs = of_table(2, report.data_set)
    rows = [_published(row) for row in theirs]
    rows += [_measured(report, figures) for figures in report.results]
    return Sheet("Table 2 of the paper: other methods", header, rows, _notes(theirs, report), keys=4)


def _table_3(report: Report) -> Sheet:
    header = ["method", "figures", "photos of", "n", *_DISTANCES]
    theirs = of_table(3, report.data_set)
    ours = [figures for figures in report.results if figures.setting.method != "tiles"]
    rows = [_published(row) for row in theirs] + [_measured(report, figures) for figures in ours]
    notes = _notes(theirs, report)
    if not ours:
        notes = (*notes, "Ours was not run: give --method geoclip, --method joined and --method fused.")
    return Sheet("Table 3 of the paper: with GeoCLIP", header, rows, notes, keys=4)


def _published(row: Published) -> list[str]:
    shares = [f"{value} % ({_ends(share)})" for value, share in zip(row.percent, row.within, strict=True)]
    about = "about " if row.note else ""
    return [row.method, "published", _SET_TITLES[row.data_set], f"{about}{row.photos}", *shares]


def _measured(report: Report, figures: SettingFigures) -> list[str]:
    shares = [_interval(share) for share in _within(figures)]
    return [
        f"geoengine, {label(figures.setting)}",
        "measured",
        report.title,
        str(figures.accuracy.photos),
        *shares,
    ]


def _notes(theirs: Sequence[Published], report: Report) -> tuple[str, ...]:
    """Return where the published rows are from, and what keeps them from being compared with ours."""
    notes = []
    if any(row.data_set != report.data_set for row in theirs):
        notes.append(f"The published rows are of another data set than {report.title}: do not compare them.")
    of = {"im2gps": 237}
    for row in theirs:
        if row.note:
            whole = f" of {of[row.data_set]}" if row.photos < of.get(row.data_set, 0) else ""
            notes.append(f"{row.method}: about {row.photos}{whole} photos; {row.note}.")
    notes += [f"Published in: {source}." for source in dict.fromkeys(row.source for row in theirs)]
    return tuple(notes)


def _within(figures: SettingFigures) -> list[Share]:
    return list(figures.accuracy.within_km.values())


def _interval(share: Share) -> str:
    return f"{percent(share.value)} ({_ends(share)})"


def _ends(share: Share) -> str:
    return f"{100 * share.low:.1f}–{100 * share.high:.1f}"


def _km(km: float) -> str:
    from geoengine.engine.render.table import format_km

    return format_km(km) if km < float("inf") else "–"


def _seconds(seconds: float | None) -> str:
    if seconds is None or seconds != seconds:
        return "–"
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}'{rest:02}\""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def _number(value: float, form: str) -> str:
    return "–" if value != value else format(value, form)
