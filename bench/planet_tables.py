"""The tables of docs/training.md and docs/search.md on the planet, from the reports of `geoengine evaluate`.

`python -m geoengine.bench.planet_tables` fills them, and so does `make readme`; a test checks that they are
current.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geoengine.bench.accuracy import wilson_share
from geoengine.bench.readme import RESULTS, accuracy_table, filled, load_results, percent, table
from geoengine.training.recipe import RECIPES

_DOCS = Path(__file__).resolve().parent.parent / "docs"
TRAINING, SEARCH = _DOCS / "training.md", _DOCS / "search.md"

STATED = (0.5, 0.8, 0.95)
"""The stated shares whose radii are shown."""

_DISTANCES = ("1", "25", "200", "750")


def rendered(results: Path = RESULTS) -> dict[Path, str]:
    """Return both documents with their blocks filled from the files in `results`."""
    blocks = {
        TRAINING: {"recipes": recipes_table(results / "training")},
        SEARCH: {
            "radius": radius_table(load_results(results / "planet")),
            "widths": accuracy_table(load_results(results / "planet" / "widths")),
        },
    }
    return {
        document: filled(document.read_text(encoding="utf-8"), own, document.name)
        for document, own in blocks.items()
    }


def recipes_table(folder: Path) -> str:
    """Return a Markdown table of the bundles that each recipe made, all seeds together, with both scores."""
    rows = []
    for recipe in RECIPES:
        by_score: dict[str, list[dict[str, Any]]] = {}
        for file in sorted(folder.glob(f"recipe-{recipe}-seed-*.json")):
            for result in json.loads(file.read_text(encoding="utf-8"))["results"]:
                by_score.setdefault(result["score"], []).append(result)
        for score, runs in sorted(by_score.items()):
            hits = {km: _pooled(run["within_km"][km] for run in runs) for km in _DISTANCES}
            by_seed = " / ".join(percent(run["within_km"]["1"]["share"]) for run in runs)
            shares = [percent(share["share"]) for share in hits.values()]
            photos = sum(run["photos"] for run in runs)
            rows.append([recipe, score, runs[0]["k"], photos, *shares, _interval(hits["1"]), by_seed])
    distances = [f"≤ {km} km" for km in _DISTANCES]
    return table(["recipe", "score", "k", "photos", *distances, "≤ 1 km, 95 % interval", "by seed"], rows)


def radius_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the photos inside calibrated radii, with 95 % intervals at 80 %."""
    rows = []
    for result in results:
        if not result["radius_calibrated"]:
            continue
        inside = {share["stated"]: share for share in result["calibration"]}
        shares = [percent(inside[stated]["share"]) for stated in STATED]
        rows.append([result["score"], result["k"], result["photos"], *shares, _interval(inside[0.8])])
    stated = [f"{share:.0%} radius" for share in STATED]
    return table(["score", "k", "photos", *stated, "80% radius, 95 % interval"], rows)


def _pooled(shares: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the share of all photos of several sets."""
    every = list(shares)
    return wilson_share(sum(s["hits"] for s in every), sum(s["total"] for s in every)).to_dict()


def _interval(share: Mapping[str, Any]) -> str:
    return " – ".join(percent(end) for end in share["ci95"])


def main() -> None:
    """Write both documents."""
    for document, text in rendered().items():
        document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
