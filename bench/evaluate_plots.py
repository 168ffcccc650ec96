"""The figures of an evaluation as pictures: SVG or PNG, drawn with matplotlib."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.accuracy import THRESHOLDS_KM
from geoengine.bench.evaluate_report import Report, SettingFigures
from geoengine.bench.evaluate_rows import PhotoRow, Setting
from geoengine.bench.evaluate_tables import label
from geoengine.engine.extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter, Locator

FORMATS = ("svg", "png")

_CLASSES = (*THRESHOLDS_KM, float("inf"))
_COLOURS = ("#1a9850", "#91cf60", "#d9d040", "#fdae61", "#f46d43", "#b2182b")  # one for each class
_LINES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
_DASHES = ("-", "--", "-.", ":")  # lines that lie on each other are seen both
_SEA, _LAND, _INK = "#e8eef3", "#f7f4ec", "#8a8f94"
_MOST_VECTORS = 3000  # photos; more are drawn as a picture inside the SVG, which stays a few hundred KB
_OUTLINE_STEPS = 900  # cells of a grid over a map's width: finer points of outlines are left out
_DPI = 150
_NEAREST_KM, _FARTHEST_KM = 0.05, 20037.5  # the ends of the axis of errors


def check_plots() -> None:
    """Raise MissingExtraError when plots cannot be drawn here."""
    require_extra("evaluate", ("matplotlib",), "drawing plots")


def write_plots(report: Report, folder: Path, formats: Sequence[str] = ("svg",)) -> list[Path]:
    """Draw the plots of a report into a folder and return the files; needs the extra `evaluate`.

    The same rows give the same bytes. Raises OutputError when a file cannot be written.
    """
    check_plots()
    import matplotlib

    written = []
    with matplotlib.rc_context({"svg.hashsalt": "geoengine", "font.size": 10.0}):
        for name, figure in _figures(report):
            for form in formats:
                path = folder / f"{name}.{form}"
                _write(figure, path, form)
                written.append(path)
    return written


def _figures(report: Report) -> Iterator[tuple[str, Figure]]:
    yield "cumulative", cumulative_plot(report)
    if any(figures.calibration for figures in report.results):
        yield "calibration", calibration_plot(report)
    if len({figures.setting.k for figures in _with_beam(report)}) > 1:
        yield "beam-width", beam_plot(report)
    for figures in report.results:
        yield f"errors-{_file_name(figures.setting)}", error_map(report, figures)


def _file_name(setting: Setting) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{setting.method}-{setting.score}-k{setting.k}".lower())


def _write(figure: Figure, path: Path, form: str) -> None:
    from geoengine.engine.render.files import OutputError

    try:
        metadata = {"Date": None} if form == "svg" else {}
        figure.savefig(path, format=form, dpi=_DPI, metadata=metadata)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # and not pyplot, which keeps figures and picks a window system

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, list(axes)


def cumulative_plot(report: Report) -> Figure:
    """Return the share of photos placed within each distance, one line for each setting."""
    figure, [axis] = _figure(7.0, 4.4)
    for style, figures in zip(_styles(len(report.results)), report.results, strict=True):
        errors = np.sort(figures.errors[np.isfinite(figures.errors)])
        share = np.arange(1, len(errors) + 1) / len(figures.errors)
        x = np.concatenate([[_NEAREST_KM], np.maximum(errors, _NEAREST_KM), [_FARTHEST_KM]])
        y = np.concatenate([[0.0], share, share[-1:] if len(share) else [0.0]])
        n = figures.accuracy.photos
        axis.step(x, y, where="post", **style, label=f"{label(figures.setting)}, n={n}")
    for km in THRESHOLDS_KM:
        axis.axvline(km, color=_INK, linewidth=0.7, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlim(_NEAREST_KM, _FARTHEST_KM)
    axis.set_ylim(0, 1.01)
    axis.set_xticks(THRESHOLDS_KM, [f"{km:,g}" for km in THRESHOLDS_KM])
    axis.xaxis.set_minor_locator(_no_ticks())
    axis.yaxis.set_major_formatter(_percents())
    axis.set_xlabel("error, km")
    axis.set_ylabel("photos placed within")
    axis.set_title(report.title, loc="left")
    axis.legend(frameon=False, fontsize=8)
    return figure


def calibration_plot(report: Report) -> Figure:
    """Return how many photos lie inside the radius said to hold a share, with 95 % intervals."""
    figure, [axis] = _figure(5.2, 4.8)
    axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle="--", label="calibrated")
    for style, figures in zip(_styles(len(report.results)), report.results, strict=True):
        stated, inside = list(figures.calibration), list(figures.calibration.values())
        name = f"{label(figures.setting)}, n={inside[0].total if inside else 0}"
        axis.plot(stated, [share.value for share in inside], **style, label=name)
        lows, highs = [share.low for share in inside], [share.high for share in inside]
        axis.fill_between(stated, lows, highs, color=style["color"], alpha=0.1, linewidth=0)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_aspect("equal")
    axis.xaxis.set_major_formatter(_percents())
    axis.yaxis.set_major_formatter(_percents())
    axis.set_xlabel("share that the radius is said to hold")
    axis.set_ylabel("photos inside the radius")
    axis.set_title(report.title, loc="left")
    axis.legend(frameon=False, fontsize=8)
    return figure


def beam_plot(report: Report) -> Figure:
    """Return accuracy against beam width at each distance, one line for each way of scoring."""
    figure, axes = _figure(13.0, 3.4, len(THRESHOLDS_KM))
    shown = _with_beam(report)
    kinds = sorted({figures.setting[:2] for figures in shown})
    widths = sorted({figures.setting.k for figures in shown})
    for axis, km in zip(axes, THRESHOLDS_KM, strict=True):
        for style, kind in zip(_styles(len(kinds)), kinds, strict=True):
            own = sorted(
                (figures for figures in shown if figures.setting[:2] == kind),
                key=lambda figures: figures.setting.k,
            )
            shares = [figures.accuracy.within_km[km] for figures in own]
            ks = [figures.setting.k for figures in own]
            axis.plot(ks, [s.value for s in shares], **style, marker="o", ms=3.5, label=_kind(own[0]))
            lows, highs = [s.low for s in shares], [s.high for s in shares]
            axis.fill_between(ks, lows, highs, color=style["color"], alpha=0.12, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, [str(k) for k in widths])
        axis.xaxis.set_minor_locator(_no_ticks())
        axis.yaxis.set_major_formatter(_percents())
        axis.set_xlabel("beam width k")
        axis.set_title(f"within {km:,g} km", loc="left", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{report.title}, n={report.photos}", x=0.01, ha="left", fontsize=10)
    return figure


def _with_beam(report: Report) -> list[SettingFigures]:
    return [figures for figures in report.results if figures.setting.k]


def _kind(figures: SettingFigures) -> str:
    return label(figures.setting).rpartition(", k=")[0] or label(figures.setting)


def error_map(report: Report, figures: SettingFigures) -> Figure:
    """Return a map with a line from where each photo was taken to where it was placed."""
    from matplotlib.collections import LineCollection

    rows = [row for row in report.rows if row.setting == figures.setting]
    figure, [axis] = _figure(11.0, 5.6)
    axis.grid(False)
    many = len(rows) > _MOST_VECTORS
    placed = [(row, error) for row, error in zip(rows, figures.errors, strict=True) if row.place is not None]
    _frame(axis, [place for row, _ in placed for place in (row.true, row.place) if place is not None])
    _draw_world(axis, report.world)
    classes = np.searchsorted(_CLASSES, [error for _, error in placed])  # an error at the end is inside
    for number in reversed(range(len(_CLASSES))):
        chosen = [row for (row, _), own in zip(placed, classes, strict=True) if own == number]
        lines = [line for row in chosen for line in _line(row)]
        axis.add_collection(
            LineCollection(
                lines, colors=_COLOURS[number], linewidths=0.7, alpha=0.55, rasterized=many, zorder=2
            )
        )
        axis.scatter(
            [row.true.lng for row in chosen],
            [row.true.lat for row in chosen],
            s=float(np.clip(8000 / len(rows), 3, 14)),  # smaller where there are many
            color=_COLOURS[number],
            edgecolors="white",
            linewidths=0.35,
            rasterized=many,
            label=f"{_class_name(number)}: {len(chosen)}",
            zorder=4 + len(_CLASSES) - number,
        )
    unread = len(rows) - len(placed)
    note = f", {unread} unreadable" if unread else ""
    axis.set_title(f"{report.title}: {label(figures.setting)}, n={len(rows)}{note}", loc="left")
    handles, names = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1],
        names[::-1],
        title="error (dot: taken, line: to the answer)",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.03),
        ncols=len(_CLASSES),
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        markerscale=1.8,
    )
    return figure


def _class_name(number: int) -> str:
    if number == len(THRESHOLDS_KM):
        return f"> {THRESHOLDS_KM[-1]:,g} km"
    return f"≤ {THRESHOLDS_KM[number]:,g} km"


def _line(row: PhotoRow) -> list[list[tuple[float, float]]]:
    """Return the line from truth to answer, the short way: two pieces where it crosses the antimeridian."""
    assert row.place is not None
    (x, y), (x2, y2) = row.true, row.place
    turns = -round((x2 - x) / 360)
    if turns == 0:
        return [[(x, y), (x2, y2)]]
    return [[(x, y), (x2 + 360 * turns, y2)], [(x - 360 * turns, y), (x2, y2)]]


def _frame(axis: Axes, places: Sequence[tuple[float, float]]) -> None:
    """Show the places and some room around them; the world when they are all over it."""
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(True)
        side.set_color("#c8ccd0")
    points = np.array(places, dtype=np.float64).reshape(-1, 2)
    low, high = (points.min(axis=0), points.max(axis=0)) if len(points) else (np.zeros(2), np.full(2, 999.0))
    room = np.maximum(0.1 * (high - low), 2.0)
    if (high - low)[0] > 180 or (high - low)[1] > 90:
        axis.set_xlim(-180, 180)
        axis.set_ylim(-86, 86)
    else:
        axis.set_xlim(low[0] - room[0], high[0] + room[0])
        axis.set_ylim(max(low[1] - room[1], -90), min(high[1] + room[1], 90))


def _draw_world(axis: Axes, world: str) -> None:
    axis.set_facecolor(_SEA if world == "planet" else _LAND)
    if world == "planet":
        from geoengine.engine.sources import planet

        lng, lat = np.linspace(-180, 180, 721), np.linspace(-85, 85, 341)
        x, y = np.meshgrid(lng, lat)
        land = planet.is_land(x.ravel(), y.ravel()).reshape(x.shape).astype(float)
        axis.contourf(lng, lat, land, levels=[0.5, 1.5], colors=[_LAND], zorder=1)
        axis.contour(lng, lat, land, levels=[0.5], colors=[_INK], linewidths=0.4, zorder=1)
        return
    from matplotlib.collections import LineCollection

    from geoengine.engine.regions.countries import outlines

    (west, east), (south, north) = axis.get_xlim(), axis.get_ylim()
    step_deg = (east - west) / _OUTLINE_STEPS
    lines = []
    for arc in outlines():
        (left, low), (right, high) = arc.min(axis=0), arc.max(axis=0)
        seen = left <= east and right >= west and low <= north and high >= south
        if seen and max(right - left, high - low) > step_deg:
            lines += _unbroken(_thinned(arc, step_deg))
    axis.add_collection(LineCollection(lines, colors=_INK, linewidths=0.4, zorder=1))


def _thinned(arc: NDArray[np.float64], step_deg: float) -> NDArray[np.float64]:
    """Return the points float64[n, 2] of an outline that start a new cell of a grid, and its ends."""
    cells = np.floor(arc / step_deg)
    kept = np.ones(len(arc), dtype=bool)
    kept[1:-1] = (cells[1:-1] != cells[:-2]).any(axis=1)
    return arc[kept]


def _unbroken(arc: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return the pieces of an outline between its jumps from one edge of the map to the other."""
    jumps = np.flatnonzero(abs(np.diff(arc[:, 0])) > 180) + 1
    return [piece for piece in np.split(arc, jumps) if len(piece) > 1]


def _styles(count: int) -> list[dict[str, Any]]:
    """Return how to draw that many lines."""
    return [
        {"color": _LINES[i % len(_LINES)], "linestyle": _DASHES[i % len(_DASHES)], "linewidth": 1.8}
        for i in range(count)
    ]


def _percents() -> Formatter:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1)


def _no_ticks() -> Locator:
    from matplotlib.ticker import NullLocator

    return NullLocator()
