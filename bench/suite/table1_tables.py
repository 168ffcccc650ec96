"""Table 1 on a machine as Markdown, from its file of results; what is measured, `table1` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from geoengine.bench.accuracy import THRESHOLDS_KM
from geoengine.bench.readme import table

PAPERS_GOALS = {"cold": 6.0, "indexed": 10.0, "warm": 500.0}
"""How many times faster than the paper's procedure, at k=16, with ViT-B/32 on two CPU cores."""

GPU_GOALS_S = {(16, "cold"): 0.1, (64, "cold"): 0.3, (16, "warm"): 0.005}
"""Seconds for one photo at a k, with ViT-B/32 on an H200."""

MOST_GB = 2.5
"""Peak memory at k=64."""

_KINDS = {"cold": "nothing known", "indexed": "first levels indexed", "warm": "all tiles known"}


def speedups(row: Mapping[str, Any]) -> dict[str, float]:
    """Return how many times faster a row's medians are than the paper's procedure of the same run."""
    if not row["paper"]:
        return {}
    own = {kind: row[kind] for kind in _KINDS if row[kind]}
    return {kind: row["paper"]["extrapolated_s"] / times["median"] for kind, times in own.items()}


def key_figures(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the few figures that tell machines apart."""
    found = {}
    for row in _rows(document):
        for kind in ("cold", "warm"):
            found[f"k={row['k']} {kind}"] = _seconds(row[kind]["median"])
        if row["paper"]:
            found[f"k={row['k']}, times the paper's procedure"] = f"{speedups(row)['cold']:.1f}"
        found[f"k={row['k']} peak memory"] = f"{_gigabytes(row):.2f} GB"
    return found


def tables(document: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    facts, rows = document["facts"], _rows(document)
    if not rows:
        return "No k has been measured yet.\n"
    parts = [_conditions(facts), _times(rows), _ratios(rows, facts)]
    parts += [_crowded(document), _accuracies(rows, facts), _goals(rows, facts)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return sorted(document["rows"], key=lambda row: int(row["k"]))


def _conditions(facts: Mapping[str, Any]) -> str:
    tiles = facts["tiles"]
    if facts["network_ms"] is not None:
        tiles = f"a server on this machine that answers after {facts['network_ms']:g} ms, without a cache"
    return (
        f"{facts['model']}, {facts['backend']} {facts['precision']}; {facts['photos']}; tiles "
        f"from {tiles}. Seconds are of one photo from its pixels to the answer, encoders loaded: median "
        "(least - most) over the photos. Indexed: zooms 4, 6 and 8 in an index, whose rows are random, since "
        "scoring costs the same, and nothing else known. Known: all tiles were met in a search before. "
        "Distinct are the pictures that were encoded. Memory is the most that the process which did all this "
        "at one k had resident; the paper's procedure runs in another."
    )


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "k",
        "photos",
        "tiles",
        "distinct",
        "nothing known, s",
        "indexed, s",
        "distinct then",
        "known, s",
        "memory, GB",
    ]
    body = [
        [
            str(row["k"]),
            str(row["photos"]),
            f"{row['tiles']:g}",
            f"{row['distinct']:g}",
            _spread(row["cold"]),
            _spread(row["indexed"]),
            "-" if row["indexed_distinct"] is None else f"{row['indexed_distinct']:g}",
            _spread(row["warm"]),
            f"{_gigabytes(row):.2f}",
        ]
        for row in rows
    ]
    return table(head, body)


def _ratios(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    head = ["k", "published, s", "times faster: nothing known", "indexed", "known"]
    head += ["paper's procedure here, s", "times faster: nothing known", "indexed", "known"]
    body = []
    lacking = facts["paper"].get("missing")
    for row in rows:
        stated, again = row["published_s"], speedups(row)
        own = {kind: stated / row[kind]["median"] for kind in _KINDS if stated and row[kind]}
        here = f"not installed: {lacking}" if lacking else "-"
        if row["paper"]:
            here = f"{row['paper']['extrapolated_s']:.3g}"
        cells = [_times_faster(own.get(kind)) for kind in _KINDS]
        cells += [here, *(_times_faster(again.get(kind)) for kind in _KINDS)]
        body.append([str(row["k"]), f"{stated:g}" if stated else "-", *cells])
    return table(head, body) + "\n" + _how_extrapolated(rows, facts)


def _how_extrapolated(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    if "left_out" in facts["paper"]:
        return f"The paper's procedure could not be run: {facts['paper']['left_out']}."
    measured = [
        f"at k={row['k']} {row['paper']['tiles']} of {row['paper']['searched']:g} tiles in "
        f"{row['paper']['seconds']:.1f} s"
        for row in rows
        if row["paper"]
    ]
    published_note = (
        "Published seconds are those of the paper's Table 1, of ViT-B/32 on its authors' machine and with "
        "tiles from its own source."
    )
    if not measured:
        return published_note
    about = facts["paper"]
    return (
        f"{published_note} The paper's procedure, Algorithm 1 one tile at a time in PyTorch {about['torch']} "
        f"(eager, float32, {about['device']}, {about['threads']} threads, random weights of the same size), "
        "ran in turn with ours, and its seconds are extrapolated by the number of tiles: "
        f"{'; '.join(measured)}."
    )


def _crowded(document: Mapping[str, Any]) -> str:
    """Say when other work makes the ratios doubtful, "" when it does not."""
    machine = document["machine"]
    if machine["load"] <= machine["cores"]:
        return ""
    return (
        f"The load was {machine['load']:g} on {machine['cores']} cores when this began: two threads that "
        "wait for each other at every layer, as PyTorch's do, suffer more from other work than ours, so that "
        "the ratios flatter us. Measure on a quiet machine."
    )


def _accuracies(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    if all(row["accuracy"] is None for row in rows):
        return f"Accuracy: - ({facts['accuracy_note']})." if facts["accuracy_note"] else ""
    head = ["k", "photos", *(f"within {km:g} km" for km in THRESHOLDS_KM), "median error, km"]
    body = []
    for row in rows:
        own = row["accuracy"]
        if own is None:
            continue
        shares = [own["within_km"][f"{km:g}"] for km in THRESHOLDS_KM]
        cells = [
            f"{100 * s['share']:.0f} % ({100 * s['ci95'][0]:.0f} - {100 * s['ci95'][1]:.0f})" for s in shares
        ]
        error = own["median_km"]
        body.append([str(row["k"]), str(own["photos"]), *cells, _kilometres(error)])
    note = "Shares with 95 % intervals, of the search with nothing known."
    if facts["world"] == "planet":
        note += " The planet is made up: figures of it are no figures of Earth."
    return table(head, body) + "\n" + note


def _goals(measured: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """Say which goals are met; they are of ViT-B/32."""
    rows = {row["k"]: row for row in measured}
    if not str(facts["model"]).startswith("ViT-B-32"):
        return ""
    body = []
    if facts["on_gpu"]:
        for (k, kind), most in GPU_GOALS_S.items():
            if k in rows:
                got = rows[k][kind]["median"]
                what = f"k={k}, {_KINDS[kind]}, on an H200"
                body.append([what, f"at most {_seconds(most)}", _seconds(got), _met(got <= most)])
    elif 16 in rows:
        for kind, least in PAPERS_GOALS.items():
            ratio = speedups(rows[16]).get(kind)
            if ratio is not None:
                what = f"k=16, {_KINDS[kind]}, times the paper's procedure"
                body.append([what, f"at least {least:g}", f"{ratio:.1f}", _met(ratio >= least)])
    if 64 in rows:
        got = _gigabytes(rows[64])
        body.append(["k=64, peak memory", f"at most {MOST_GB:g} GB", f"{got:.2f} GB", _met(got <= MOST_GB)])
    return table(["goal", "wanted", "measured", ""], body) if body else ""


def _met(met: bool) -> str:
    return "met" if met else "not met"


def _gigabytes(row: Mapping[str, Any]) -> float:
    return float(row["peak_mib"]) * 2**20 / 1e9


def _kilometres(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.2g}" if error < 10 else f"{error:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _spread(times: Mapping[str, Any] | None) -> str:
    if times is None:
        return "-"
    return f"{times['median']:.3g} ({times['least']:.3g} - {times['most']:.3g})"


def _times_faster(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.1f}"
