"""Scoring beside each other: `cosine_topk` and what a user would take, over the same rows and queries.

Beside the time stands which of the truly best rows a method finds, since rounded rows may give others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.kernels import OURS, READ, Case, Table, duration, turns
from geoengine.bench.readme import percent, table
from geoengine.bench.suite.results import Results
from geoengine.bench.suite.timing import Spread
from geoengine.engine.cores import available_cores
from geoengine.export.check import Progress

CASES = tuple(Case(n, 512, m, 16) for n in (256, 65_536, 262_144) for m in (1, 16))
"""A level's tiles of one photo, and indices of two sizes; one photo and sixteen."""

SECONDS = 0.4
"""For each method and case, of as many turns as fit; at least three."""
_BLOCK = 65_536


def measure_scoring(
    results: Results, progress: Progress, cases: tuple[Case, ...] = CASES, seconds: float = SECONDS
) -> None:
    """Add a row for each case: what each method takes, and how right it is."""
    ready: Table | None = None
    for number, case in enumerate(sorted(cases)):
        progress(number, len(cases), f"scoring {case.n:,} rows")
        if results.known(case_key(case)):
            continue
        if ready is None or ready.single.shape != (case.n, case.d):
            ready = None  # gives the memory back before the next table takes it
            ready = Table(case.n, case.d, available_cores())
        results.add(case_key(case), part="scoring", **case._asdict(), methods=compare(ready, case, seconds))


def case_key(case: Case) -> str:
    """Return the key of a case's row."""
    return f"n={case.n} d={case.d} m={case.m} k={case.k}"


def compare(ready: Table, case: Case, seconds: float) -> dict[str, dict[str, Any]]:
    """Return each method's seconds and the share of the k best rows that it finds, or what to install."""
    queries = np.random.default_rng(1).standard_normal((case.m, case.d), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact = exact_best(ready.single, queries, case.k)
    times = turns(ready.methods, queries, case.k, seconds)
    figures: dict[str, dict[str, Any]] = {
        name: {
            "ours": name in OURS,
            "seconds": Spread.of(times[name]).to_dict(),
            "found": found_share(found_rows(method(queries, case.k), case.m), exact),
        }
        for name, method in ready.methods.items()
        if name != READ
    }
    return figures | {name: {"ours": False, "missing": hint} for name, hint in ready.missing.items()}


def exact_best(rows: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the k best rows of each query, int64[m, k], scored in double precision."""
    right = queries.astype(np.float64).T
    blocks = [
        rows[first : first + _BLOCK].astype(np.float64) @ right for first in range(0, len(rows), _BLOCK)
    ]
    scores = np.concatenate(blocks).T  # (m, n)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def found_rows(result: Any, queries: int) -> NDArray[np.int64]:  # noqa: ANN401 - each library has its own
    """Return the rows that a method found, int64[m, k]: a pair's second, torch's indices, usearch's keys."""
    for name in ("indices", "keys"):
        if hasattr(result, name):
            return np.asarray(getattr(result, name), np.int64).reshape(queries, -1)
    return np.asarray(result[1], np.int64).reshape(queries, -1)


def found_share(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """Return how many of the exact rows were found, over all queries."""
    return float(np.mean([np.isin(right, own).mean() for own, right in zip(found, exact, strict=True)]))


def quickest(row: Mapping[str, Any], *, ours: bool) -> tuple[str, dict[str, Any]] | None:
    """Return the quickest method of ours, or of the peers, in a case."""
    ran = [item for item in row["methods"].items() if item[1]["ours"] == ours and "seconds" in item[1]]
    return min(ran, key=lambda item: item[1]["seconds"]["median"], default=None)


def scoring_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the scoring's cases."""
    return [row for row in document["rows"] if row.get("part") == "scoring"]


def scoring_text(document: Mapping[str, Any]) -> str:
    """Return the scoring as Markdown, empty where none was measured."""
    rows = scoring_rows(document)
    if not rows:
        return ""
    header = ["method", *(f"{row['n']:,} rows, {row['m']} at once" for row in rows)]
    base = [quickest(row, ours=True) for row in rows]
    lines = [["our quickest", *(f"{duration(own[1]['seconds']['median'])}" if own else "" for own in base)]]
    names = list(dict.fromkeys(name for row in rows for name in row["methods"]))
    for name in names:
        cells = []
        for row, own in zip(rows, base, strict=True):
            figures = row["methods"].get(name, {})
            if "seconds" not in figures:
                cells.append(f"not installed: {figures['missing']}" if "missing" in figures else "")
                continue
            times = (
                "" if own is None else f"{figures['seconds']['median'] / own[1]['seconds']['median']:.2f} x"
            )
            cells.append(f"{times}, {percent(figures['found'])}")
        lines.append([f"**{name}**" if name in OURS else name, *cells])
    about = (
        f"The {rows[0]['k']} best of n rows of {rows[0]['d']} values and length 1, random, for one query or "
        "several in a call. A figure with x says how many times as long as our quickest a method takes; the "
        "other, how many of the truly best rows (scored in double precision) it finds. Ours in bold.\n"
    )
    return about + table(header, lines)
