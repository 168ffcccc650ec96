"""The results of `scale` as tables and log-log plots."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from geoengine.bench.readme import table
from geoengine.engine.extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOAL_PHOTOS, GOAL_RATIO = 64, 0.1
"""So many photos of one region in one call cost at most this of one photo alone, each."""

_LINES = ("#4477aa", "#ee6677", "#228833", "#aa3377")
_SCENES = {"region": "one region", "world": "all the world"}


def tables(document: Mapping[str, Any]) -> str:
    """Return the rows as Markdown; an unfinished document has fewer."""
    blocks = []
    photos, ks, rows = (_rows(document, part) for part in ("photos", "k", "rows"))
    if photos:
        blocks += ["### Photos in one call", _photos_note(document), photos_table(photos), goal_text(photos)]
    if ks:
        blocks += ["### Beam width, one photo", _series_note(document), k_table(ks)]
    if rows:
        blocks += ["### Rows of an index", _ROWS_NOTE, rows_table(rows)]
    return "\n\n".join(block for block in blocks if block) + "\n"


_ROWS_NOTE = (
    "Random rows of 512 numbers in half precision. Opening maps the file; what scoring has resident of it "
    "can be taken back by the system at any time. Scoring is that of one photo against all rows."
)


def _photos_note(document: Mapping[str, Any]) -> str:
    km = document["facts"].get("region_km", 0)
    return (
        f"{_series_note(document)} One region: photos within {km:g} km of one place, which the search does "
        "not know: it covers all of the planet. The planet's encoders are trained and share what trained "
        "encoders share. Others read, encode and rank the very tiles that the trained search asked for, as "
        "weights that know no places would share tiles or not for no reason. Tiles asked for is photos times "
        "tiles; distinct tiles is what is read and encoded. Nothing is known from earlier calls."
    )


def _series_note(document: Mapping[str, Any]) -> str:
    series = document["facts"].get("series", {})
    return "; ".join(f"{name}: {about}" for name, about in series.items()) + "." if series else ""


def photos_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what a call costs by its photos, and each distinct tile of it."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["series"], row["scene"], row["photos"])):
        count, seconds = row["photos"], row.get("seconds")
        line: list[object] = [row["series"], _SCENES[row["scene"]], count]
        line += [f"{row[name]:,}" if name in row else "" for name in ("asked", "distinct")]
        if seconds is None:
            lines.append([*line, _left_out(row), "", "", ""])
            continue
        median = seconds["median"]
        lines.append(
            [
                *line,
                duration(median),
                duration(median / count),
                f"{count / median:.3g}",
                f"{1e3 * median / row['distinct']:.2f} ms",
            ]
        )
    header = ["encoders", "photos of", "photos", "tiles asked for", "distinct tiles", "a call", "a photo"]
    return table([*header, "photos a second", "a distinct tile"], lines)


def goal_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return whether many photos of a region cost as little as they should."""
    lines = []
    for name in dict.fromkeys(row["series"] for row in rows):
        ratio = goal_ratio(rows, name)
        if ratio is None:
            lines.append(f"- {name}: not measured")
            continue
        met = "met" if ratio <= GOAL_RATIO else "not met"
        lines.append(f"- {name}: {ratio:.3f} of one photo alone: {met}")
    goal = f"Goal: {GOAL_PHOTOS} photos of one region in one call cost at most {GOAL_RATIO:g} of one photo"
    return f"{goal} alone, each.\n\n" + "\n".join(lines)


def goal_ratio(rows: Sequence[Mapping[str, Any]], series: str) -> float | None:
    """Return what a photo of many of a region costs, over one alone; None when one of both is lacking."""
    medians = {
        row["photos"]: row["seconds"]["median"]
        for row in rows
        if row["series"] == series and row["scene"] == "region" and "seconds" in row
    }
    if not {1, GOAL_PHOTOS} <= set(medians):
        return None
    return float(medians[GOAL_PHOTOS] / GOAL_PHOTOS / medians[1])


def k_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what one photo costs by its beam width."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["series"], row["k"])):
        line: list[object] = [row["series"], row["k"], f"{row['distinct']:,}"]
        seconds = row.get("seconds")
        if seconds is None:
            lines.append([*line, _left_out(row), ""])
        else:
            median = seconds["median"]
            lines.append([*line, duration(median), f"{1e3 * median / row['distinct']:.2f} ms"])
    return table(["encoders", "k", "tiles", "one photo", "a tile"], lines)


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what an index costs by its rows."""
    lines = []
    for row in sorted(rows, key=lambda row: int(row["rows"])):
        line: list[object] = [f"{row['rows']:,}", f"{row['bytes'] / 1e6:,.0f} MB"]
        if "left_out" in row:
            lines.append([*line, f"left out: {row['left_out']}", "", "", "", "", ""])
            continue
        median = row["scoring_s"]["median"]
        lines.append(
            [
                *line,
                duration(row["opening_s"]),
                f"{row['opening_mib']:.1f} MiB",
                f"{row['own_mib']:.1f} MiB",
                duration(row["first_s"]),
                duration(median),
                f"{row['bytes'] / median / 1e9:.1f}",
            ]
        )
    header = ["rows", "file", "opening", "resident when open", "own memory when scored"]
    return table([*header, "first scoring", "scoring", "GB/s"], lines)


def key_figures(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures that stand for this benchmark beside other machines'."""
    figures = {}
    photos = _rows(document, "photos")
    for series in dict.fromkeys(row["series"] for row in photos):
        ratio = goal_ratio(photos, series)
        if ratio is not None:
            figures[f"{GOAL_PHOTOS} photos of a region, each over one alone, {series}"] = f"{ratio:.3f}"
    for row in _rows(document, "rows"):
        if "scoring_s" in row:
            figures[f"scoring {row['rows']:,} rows"] = duration(row["scoring_s"]["median"])
    return figures


def _rows(document: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    return [row for row in document["rows"] if row["part"] == part]


def _left_out(row: Mapping[str, Any]) -> str:
    return f"left out: about {duration(row['left_out_s'])}, see --seconds"


def duration(seconds: float) -> str:
    """Return a time in a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 100 * size else f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def plots(document: Mapping[str, Any]) -> dict[str, str]:
    """Return log-log plots as SVG, by the stem of their files; needs the extra `evaluate`."""
    require_extra("evaluate", ("matplotlib",), "drawing plots")
    drawn, name = {}, document["benchmark"]
    photos, ks, rows = (_rows(document, part) for part in ("photos", "k", "rows"))
    if any("seconds" in row for row in photos):
        drawn[f"{name}-photos"] = _svg(
            lambda axes: _draw_photos(axes, photos),
            ("photos in one call", "photos in one call"),
            ("seconds a photo", "ms a distinct tile"),
        )
    if any("seconds" in row for row in ks):
        drawn[f"{name}-k"] = _svg(
            lambda axes: _draw_k(axes, ks),
            ("beam width k", "beam width k"),
            ("seconds, one photo", "ms a tile"),
        )
    if any("scoring_s" in row for row in rows):
        drawn[f"{name}-rows"] = _svg(
            lambda axes: _draw_rows(axes, rows), ("rows of the index",) * 2, ("milliseconds", "MiB")
        )
    return drawn


def _svg(draw: Any, x_labels: Sequence[str], y_labels: Sequence[str]) -> str:  # noqa: ANN401 - a function
    import matplotlib
    from matplotlib.figure import Figure  # and not pyplot, which keeps figures and picks a window system

    with matplotlib.rc_context({"svg.hashsalt": "geoengine", "font.size": 10.0}):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        axes = list(figure.subplots(1, 2))
        for axis in axes:
            axis.set_xscale("log")
            axis.set_yscale("log")
        draw(axes)
        for axis, x_label, y_label in zip(axes, x_labels, y_labels, strict=True):
            axis.set_xlabel(x_label)
            axis.set_ylabel(y_label)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="#e5e5e5", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _draw_photos(axes: Sequence[Axes], rows: Sequence[Mapping[str, Any]]) -> None:
    for (series, scene), own in _grouped(rows, ("series", "scene"), "photos"):
        x = [row["photos"] for row in own]
        seconds = [row["seconds"]["median"] for row in own]
        style = {"marker": "o", "ms": 4, "color": own[0]["colour"], "label": f"{series}: {_SCENES[scene]}"}
        axes[0].plot(x, [s / n for s, n in zip(seconds, x, strict=True)], **style)
        tiles = [row["distinct"] for row in own]
        axes[1].plot(x, [1e3 * s / n for s, n in zip(seconds, tiles, strict=True)], **style)
        if scene == "region" and x[0] == 1:
            shared = [seconds[0] * n / tiles[0] / count for n, count in zip(tiles, x, strict=True)]
            label = f"{series}: one photo's time by distinct tiles"
            axes[0].plot(x, shared, linestyle=":", linewidth=1.2, color=own[0]["colour"], label=label)
    _ticks(axes, sorted({row["photos"] for row in rows}))


def _draw_k(axes: Sequence[Axes], rows: Sequence[Mapping[str, Any]]) -> None:
    for (series,), own in _grouped(rows, ("series",), "k"):
        x = [row["k"] for row in own]
        style = {"marker": "o", "ms": 4, "color": own[0]["colour"], "label": series}
        axes[0].plot(x, [row["seconds"]["median"] for row in own], **style)
        axes[1].plot(x, [1e3 * row["seconds"]["median"] / row["distinct"] for row in own], **style)
    _ticks(axes, sorted({row["k"] for row in rows}))


def _draw_rows(axes: Sequence[Axes], rows: Sequence[Mapping[str, Any]]) -> None:
    own = sorted((row for row in rows if "scoring_s" in row), key=lambda row: int(row["rows"]))
    x = [row["rows"] for row in own]
    lines = {
        "scoring, one photo": [1e3 * row["scoring_s"]["median"] for row in own],
        "opening": [1e3 * row["opening_s"] for row in own],
    }
    for colour, (name, values) in zip(_LINES, lines.items(), strict=False):
        axes[0].plot(x, values, marker="o", ms=4, color=colour, label=name)
    sizes = {
        "file": [row["bytes"] / 2**20 for row in own],
        "own memory when scored": [max(row["own_mib"], 0.01) for row in own],
        "resident when open": [max(row["opening_mib"], 0.01) for row in own],
    }
    for colour, (name, values) in zip(_LINES, sizes.items(), strict=False):
        axes[1].plot(x, values, marker="o", ms=4, color=colour, label=name)


def _grouped(
    rows: Sequence[Mapping[str, Any]], by: tuple[str, ...], along: str
) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Return the measured rows of each line, in order, with its colour."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "seconds" in row:
            groups.setdefault(tuple(row[name] for name in by), []).append(dict(row))
    for number, own in enumerate(groups.values()):
        own.sort(key=lambda row: int(row[along]))
        for row in own:
            row["colour"] = _LINES[number % len(_LINES)]
    return list(groups.items())


def _ticks(axes: Sequence[Axes], values: Sequence[int]) -> None:
    """Name the measured values on the x axes."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    for axis in axes:
        axis.xaxis.set_major_locator(FixedLocator(values))
        axis.xaxis.set_major_formatter(FixedFormatter([str(value) for value in values]))
        axis.xaxis.set_minor_locator(NullLocator())
