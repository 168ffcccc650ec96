"""Encoders beside each other: speed and agreement in the same run, over the same pictures.

In every round each contender encodes a batch, all in turn; what it gives is compared with PyTorch's fp32, so
that no contender is timed on pictures for which its answers are not known.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.readme import percent, table
from geoengine.bench.suite.peers_contenders import BASE, Encode, Setting, open_ours, peers_of
from geoengine.bench.suite.peers_towers import Tower, drawn_squares, drawn_tiles, random_tower
from geoengine.bench.suite.results import Results
from geoengine.bench.suite.timing import Spread
from geoengine.engine.cores import available_cores
from geoengine.engine.errors import BackendError
from geoengine.export.check import Progress

TOWERS = ("random", "outliers")
"""The towers by their row's key; speeds are those of the first."""

GOAL = 0.8
"""How much of the best peer's speed our best encoder should have at least."""

COMPARABLE = 2.0
"""A peer is comparable when its cosine to fp32 errs by at most so many times what ours errs by."""

_BEST = 16
_UNTIMED_ROUNDS = 3  # of the second tower, which tells how right an encoder is and not how fast
_PAUSE = 5e-3  # seconds, in which other libraries' threads fall asleep
_FLOOR = 1e-6  # a smaller error of a cosine is one of fp32

Rows = NDArray[np.float32]


def measure_encoders(setting: Setting, rounds: int, results: Results, progress: Progress) -> None:
    """Add a row for each tower: how right every contender is, and for the first tower how fast."""
    photos = tiles = None
    for number, kind in enumerate(TOWERS):
        if results.known(kind):
            continue
        used = rounds if number == 0 else min(rounds, _UNTIMED_ROUNDS)
        if photos is None or tiles is None:
            photos, tiles = drawn_squares(setting.batch), drawn_tiles(rounds * setting.batch)
        batches = [photos, *np.split(tiles[: used * setting.batch], used)]
        with tempfile.TemporaryDirectory(prefix="geoengine-peers-") as folder:
            progress(0, used + 1, f"{kind} tower: being made")
            tower = random_tower(Path(folder), outliers=kind == "outliers")
            contenders = compare(tower, setting, batches, _prefixed(progress, f"{kind} tower"))
        results.add(kind, part="encoders", contenders=contenders)


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda done, total, what: progress(done, total, f"{prefix}: {what}")


def compare(
    tower: Tower, setting: Setting, batches: Sequence[NDArray[np.uint8]], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Return the figures of all contenders by name; `batches` are one of photos, then some of tiles.

    The photos warm up and are what is searched for among the tiles. A contender that is not installed has
    `missing`, one that does not run `failed`, in place of figures.
    """
    import torch

    torch.set_num_threads(available_cores())
    figures: dict[str, dict[str, Any]] = {}
    encoders: dict[str, Encode] = {}
    given: dict[str, list[Rows]] = {}
    with contextlib.ExitStack() as stack:
        for name, ours, opened in _opened(tower, setting, stack, progress, len(batches)):
            figures[name] = {"ours": ours}
            if isinstance(opened, dict):
                figures[name] |= opened
                continue
            try:
                given[name] = [opened(batches[0])]
                figures[name]["batch_difference"] = _batch_difference(opened, batches[0], given[name][0])
            except Exception as error:  # a peer's own, of any kind; ours must run
                if ours or name == BASE:
                    raise
                given.pop(name, None)
                figures[name]["failed"] = _reason(error)
                continue
            encoders[name] = opened
        times = _rounds(encoders, batches[1:], given, progress)
    for name, rows in given.items():
        figures[name] |= {"seconds": Spread.of(times[name]).to_dict(), **agreement(rows, given[BASE])}
    return figures


def agreement(rows: Sequence[Rows], exact: Sequence[Rows]) -> dict[str, float]:
    """Compare embeddings, of photos and then of tiles: cosines, and the share of the best tiles in both."""
    own, right = (np.concatenate(list(part)).astype(np.float64) for part in (rows, exact))
    cosines = (own * right).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(right, axis=1)
    count = len(rows[0])
    shares = [
        len(a & b) / len(b)
        for a, b in zip(*(_best(part[:count], part[count:]) for part in (own, right)), strict=True)
    ]
    return {
        "min_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "mean_overlap": float(np.mean(shares)),
        "min_overlap": float(np.min(shares)),
    }


def _best(photos: NDArray[np.float64], tiles: NDArray[np.float64]) -> list[set[int]]:
    return [set(np.argsort(-scores, kind="stable")[:_BEST].tolist()) for scores in photos @ tiles.T]


def _opened(
    tower: Tower, setting: Setting, stack: contextlib.ExitStack, progress: Progress, steps: int
) -> Iterator[tuple[str, bool, Encode | dict[str, str]]]:
    """Yield each contender's name, whether it is ours, and it or why there is none."""
    for peer in peers_of(setting):
        gc.collect()  # what making the last one has left may be a copy of all weights
        progress(0, steps, f"opening {peer.name}")
        if peer.missing():
            yield peer.name, False, {"missing": peer.hint}
            continue
        try:
            yield peer.name, False, peer.open(tower, setting, stack)
        except Exception as error:  # a peer's own, of any kind
            if peer.name == BASE:
                raise
            yield peer.name, False, {"failed": _reason(error)}
    progress(0, steps, "opening ours")
    for name, opened in open_ours(tower, setting.backends):
        yield name, True, {"failed": str(opened)} if isinstance(opened, BackendError) else opened


def _reason(error: Exception) -> str:
    """Return the first line of an error of somebody else's."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def _batch_difference(encode: Encode, photos: NDArray[np.uint8], among: Rows) -> float:
    """Return by how much an embedding's components change when a picture is alone in its batch."""
    some = sorted({0, len(photos) - 1})
    return float(max(np.abs(encode(photos[i : i + 1])[0] - among[i]).max() for i in some))


def _rounds(
    encoders: Mapping[str, Encode],
    batches: Sequence[NDArray[np.uint8]],
    given: dict[str, list[Rows]],
    progress: Progress,
) -> dict[str, list[float]]:
    """Encode a batch a round, all contenders in turn; adds what they give, returns the seconds."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for number, batch in enumerate(batches):
        progress(number + 1, len(batches) + 1, f"round {number + 1}")
        for name, encode in encoders.items():
            time.sleep(_PAUSE)
            start = time.perf_counter()
            rows = encode(batch)
            times[name].append(time.perf_counter() - start)
            given[name].append(rows)
    return times


def encoder_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a results document's encoders, one dictionary each, in the order in which they ran.

    With figures: `name`, `ours`, `images_per_second`, `ratio` (to PyTorch eager in fp32), `ratio_to_ours` (to
    our fastest), and the agreement by tower, as far as the run came. Without: `missing` or `failed`.
    """
    towers = {row["key"]: row["contenders"] for row in document["rows"] if row.get("part") == "encoders"}
    timed = towers.get(TOWERS[0], {})
    batch = document["settings"]["batch"]
    speeds = {
        name: batch / own["seconds"]["median"]
        for name, own in timed.items()
        if own.get("seconds") is not None
    }
    ours = max((speed for name, speed in speeds.items() if timed[name]["ours"]), default=None)
    rows = []
    for name, own in timed.items():
        row: dict[str, Any] = {"name": name, "ours": own["ours"]}
        if name in speeds:
            agreeing = {
                kind: each[name] for kind, each in towers.items() if "min_cosine" in each.get(name, {})
            }
            row |= {
                "images_per_second": speeds[name],
                "ratio": speeds[name] / speeds[BASE],
                "ratio_to_ours": None if ours is None else speeds[name] / ours,
                **agreeing,
            }
        else:
            row |= {what: own[what] for what in ("missing", "failed") if what in own}
        rows.append(row)
    return rows


def worst(row: Mapping[str, Any], figure: str) -> float:
    """Return an encoder's worst figure over the towers: the least cosine or overlap, the most difference."""
    values = [float(row[kind][figure]) for kind in TOWERS if kind in row]
    return max(values) if figure == "batch_difference" else min(values)


def best_peer(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None] | None:
    """Return our fastest encoder and the fastest peer of comparable accuracy, None where none ran.

    Comparable: over both towers, the least cosine to fp32 errs at most COMPARABLE times as much as ours does.
    """
    ran = [row for row in rows if "images_per_second" in row]
    ours = max((r for r in ran if r["ours"]), key=lambda r: r["images_per_second"], default=None)
    if ours is None:
        return None
    allowed = COMPARABLE * max(_FLOOR, 1 - worst(ours, "min_cosine"))
    peers = [row for row in ran if not row["ours"] and 1 - worst(row, "min_cosine") <= allowed]
    return ours, max(peers, key=lambda r: r["images_per_second"], default=None)


def goal_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return in a sentence or two whether the goal for our encoder is met."""
    found = best_peer(rows)
    if found is None:
        return "Goal: not measured, as none of our encoders ran."
    ours, peer = found
    if peer is None:
        return f"Goal: met: no peer is about as right as {ours['name']}."
    share = ours["images_per_second"] / peer["images_per_second"]
    text = (
        f"Goal, at least {100 * GOAL:.0f} % of the speed of the best peer that errs at most {COMPARABLE:.0f} "
        f"times as much: {'met' if share >= GOAL else 'not met'}, {ours['name']} has {100 * share:.0f} % "
        f"of the speed of {peer['name']}."
    )
    fastest = max(
        (row for row in rows if "images_per_second" in row and not row["ours"]),
        key=lambda row: row["images_per_second"],
    )
    if fastest["name"] != peer["name"]:
        text += (
            f" The fastest peer of all, {fastest['name']}, has {fastest['ratio_to_ours']:.2f} times ours, "
            f"and its cosine falls to {worst(fastest, 'min_cosine'):.4f} "
            f"(ours: {worst(ours, 'min_cosine'):.4f})."
        )
    return text


def encoders_text(document: Mapping[str, Any]) -> str:
    """Return the encoders as Markdown, empty where none were measured."""
    rows = encoder_rows(document)
    if not rows:
        return ""
    header = ["encoder", "images/s", "ours = 1", "PyTorch eager = 1"]
    for kind in TOWERS:
        header += [f"{kind}: min cosine", "same top 16 (least)"]
    lines = []
    for row in rows:
        name = f"**{row['name']}**" if row["ours"] else row["name"]
        if "images_per_second" not in row:
            why = f"not installed: {row['missing']}" if "missing" in row else f"failed: {row.get('failed')}"
            lines.append([name, why, *[""] * (len(header) - 1)])
            continue
        ratio = row["ratio_to_ours"]
        cells = [
            f"{row['images_per_second']:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for kind in TOWERS:
            own = row.get(kind)
            cells += (
                [
                    f"{own['min_cosine']:.5f}",
                    f"{percent(own['mean_overlap'])} ({percent(own['min_overlap'])})",
                ]
                if own
                else ["", ""]
            )
        lines.append([name, *cells, f"{worst(row, 'batch_difference'):.0e}"])
    settings = document["settings"]
    about = (
        f"ViT-B/32 at 224 pixels, batches of {settings['batch']}, medians of {settings['rounds']} rounds in "
        "which all take turns; ours in bold. Random weights, and again with outlier channels as trained "
        "towers have them; cosines and the 16 best tiles are compared with PyTorch eager in fp32.\n"
    )
    return about + table([*header, "batch changes it by"], lines) + "\n" + goal_text(rows) + "\n"
