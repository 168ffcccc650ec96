"""What each switch of the search brings on the planet: `python -m geoengine.bench.ablation_search`.

Every cell (variant, beam width, seed) is written as soon as it is there, and a run goes on where the last one
with the same bundle was stopped. Embeddings of tiles are kept in `--rows`, which makes later variants cheap.

The planet has no population. Its priors are counts of the places that `geoengine train planet` draws, in
tiles of a zoom: half of them are uniform over the land, as the photos here are, half in clusters.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from geoengine.bench.accuracy import THRESHOLDS_KM, errors_km, wilson_share
from geoengine.bench.truth import PlanetPhotos, TruthPhoto
from geoengine.engine.calibration import CALIBRATION, STATED_SHARES
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.results import Location
from geoengine.engine.scoring.density import Density, counted
from geoengine.engine.scoring.kinds import Objective, Score
from geoengine.engine.search import SearchConfig
from geoengine.engine.tiles import tile_at
from geoengine.training.photos import Geometry
from geoengine.training.planet_photos import Planet

SCHEMA = 1
_TOGETHER = 25

VARIANTS = {
    "paper": SearchConfig(score=Score.paper),
    "path": SearchConfig(score=Score.path),
    "paper, centred": SearchConfig(score=Score.paper, centred=True),
    "path, centred": SearchConfig(score=Score.path, centred=True),
    "path, quota 2": SearchConfig(score=Score.path, quota=2),
    "path, quota 4": SearchConfig(score=Score.path, quota=4),
    "path, for 25 km": SearchConfig(score=Score.path, objective=Objective(25.0)),
    "path, for 200 km": SearchConfig(score=Score.path, objective=Objective(200.0)),
    "path, prior of zoom 4": SearchConfig(score=Score.path),
    "path, prior of zoom 8": SearchConfig(score=Score.path),
}
"""What is compared, each a search but for its beam width, its levels and its prior."""

PRIORS: Mapping[str, int] = {"path, prior of zoom 4": 4, "path, prior of zoom 8": 8}
"""The zooms of the variants' priors."""

PRIOR_PLACES = 3000
"""Places that a prior counts: as many as `geoengine train planet` draws by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which cells are wanted: photos of each seed, by beam width."""

    variants: Sequence[str]
    photos: dict[int, int]
    seeds: Sequence[int]

    def cells(self) -> Iterator[tuple[int, int, str]]:
        """Yield (seed, beam width, variant), in the order in which rows of tiles serve best."""
        yield from itertools.product(self.seeds, sorted(self.photos), self.variants)


def run(engine: GeoEngine, plan: Plan, out: Path) -> dict[str, Any]:
    """Measure the cells that `out` lacks and return all of it; raises GeoEngineError.

    Cells of another bundle or another calibration are thrown away.
    """
    from geoengine.engine.render.files import write_atomically

    made_of = _fingerprint(engine)
    data = json.loads(out.read_text()) if out.exists() else {}
    if data.get("bundle") != made_of or data.get("schema") != SCHEMA:
        manifest = engine.bundle.manifest
        model = f"{manifest.model}/{manifest.pretrained}"
        data = {"schema": SCHEMA, "bundle": made_of, "model": model, "cells": []}
    there = {(cell["seed"], cell["k"], cell["variant"]): cell for cell in data["cells"]}
    for seed, k, variant in plan.cells():
        wanted = plan.photos[k]
        if (seed, k, variant) in there and there[seed, k, variant]["photos"] >= wanted:
            continue
        there[seed, k, variant] = _cell(engine, PlanetPhotos(wanted, seed), k, variant)
        data["cells"] = [there[key] for key in sorted(there)]
        write_atomically(out, json.dumps(data, indent=1) + "\n")
        hits = sum(error <= 1 for error in there[seed, k, variant]["errors_km"])
        print(f"seed {seed} k {k} {variant}: {hits} of {wanted} within 1 km", flush=True)
    return data


def markdown(data: dict[str, Any]) -> str:
    """Return the pooled figures as a page that says what they are."""
    return f"{_HEAD}\n{table(data)}"


_HEAD = f"""# The search's switches on the demo planet

Photos that took no part in training or calibration; `python -m geoengine.bench.ablation_search` measures it
again. `paper` and `path` are the two scores, the rest one switch each. The radius is calibrated only for the
plain and centred searches, at the beam widths that were calibrated. The planet has no population: its priors
count {PRIOR_PLACES:,} places that `geoengine train planet` draws, in tiles of a zoom, half of them uniform
over the land, half in clusters. The photos here are uniform over the land, so that such a prior can tell
little more than where land is.
"""


def table(data: dict[str, Any]) -> str:
    """Return the pooled figures of all cells as Markdown: one row for each variant and beam width."""
    lines = [
        "| search | k | photos | "
        + " | ".join(f"≤ {km:,g} km" for km in THRESHOLDS_KM)
        + " | ≤ 1 km, 95 % interval | ≤ 1 km by seed | truth in last beam | truth in 80 % radius |",
        "| --- | " + " | ".join(["---:"] * (len(THRESHOLDS_KM) + 6)) + " |",
    ]
    order = list(VARIANTS)
    cells = sorted(data["cells"], key=lambda cell: (cell["k"], order.index(cell["variant"]), cell["seed"]))
    for (k, variant), group in itertools.groupby(cells, key=lambda cell: (cell["k"], cell["variant"])):
        parts = list(group)
        errors = [error for cell in parts for error in cell["errors_km"]]
        first = wilson_share(sum(error <= 1 for error in errors), len(errors))
        within = (sum(error <= km for error in errors) / len(errors) for km in THRESHOLDS_KM)
        by_seed = (sum(e <= 1 for e in cell["errors_km"]) / cell["photos"] for cell in parts)
        kept = sum(cell["kept"][-1] for cell in parts) / len(errors)
        inside = [flag for cell in parts for flag in cell["in_radius"] or ()]
        lines.append(
            f"| {variant} | {k} | {len(errors)} | "
            + " | ".join(map(_percent, within))
            + f" | {_percent(first.low)} – {_percent(first.high)} | "
            + ", ".join(map(_percent, by_seed))
            + f" | {_percent(kept)} | {_percent(sum(inside) / len(inside)) if inside else '–'} |"
        )
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cell(engine: GeoEngine, truth: PlanetPhotos, k: int, variant: str) -> dict[str, Any]:
    """Locate the photos of a seed with one variant."""
    config = replace(VARIANTS[variant], k=k, levels=engine.bundle.levels, top=1)
    photos, found = iter(truth), list[tuple[TruthPhoto, Location]]()
    start = time.perf_counter()
    with ExitStack() as stack:
        if variant in PRIORS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            config = replace(config, prior=str(_prior(PRIORS[variant], folder)))
        while batch := list(itertools.islice(photos, _TOGETHER)):
            located = engine.locate([engine.prepare(photo.read()) for photo in batch], config=config)
            found += zip(batch, located, strict=True)
    errors = errors_km([place.point for _, place in found], [photo.place for photo, _ in found])
    return {
        "seed": truth.seed,
        "k": k,
        "variant": variant,
        "photos": len(found),
        "errors_km": [round(float(error), 4) for error in errors],
        "kept": [
            sum(_kept(location, photo, zoom) for photo, location in found) for zoom in engine.bundle.levels
        ],
        "in_radius": (
            [bool(error <= place.radius_km) for error, (_, place) in zip(errors, found, strict=True)]
            if found[0][1].radius_calibrated
            else None
        ),
        "in_radii": {
            str(share): sum(
                bool(error <= place.radius_for(share))
                for error, (_, place) in zip(errors, found, strict=True)
            )
            for share in STATED_SHARES
        },
        "seconds": round(time.perf_counter() - start, 1),
    }


def _prior(zoom: int, folder: Path) -> Path:
    """Write the prior of a zoom to a folder and return its file."""
    taken = Planet(Geometry(1, "squash"), places=PRIOR_PLACES, validation=1).split("train")
    places = np.column_stack([taken.lng, taken.lat])
    ids, counts = counted(places, np.ones(len(places)), zoom)
    file = folder / f"planet-zoom-{zoom}.npz"
    Density(name=file.stem, world="planet", zoom=zoom, ids=ids, counts=counts).write(file)
    return file


def _kept(location: Location, photo: TruthPhoto, zoom: int) -> bool:
    true = tile_at(photo.place, zoom)
    return any(scored.tile == true for level in location.levels for scored in level.beam)


def _fingerprint(engine: GeoEngine) -> str:
    """Return a hash of the bundle's manifest and its calibration."""
    digest = hashlib.sha256()
    for name in ("manifest.json", CALIBRATION):
        file = engine.bundle.path / name
        digest.update(file.read_bytes() if file.exists() else b"")
    return digest.hexdigest()


def main() -> None:
    """Run the ablation and print its table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--bundle", default="planet", help="a calibrated bundle of the planet")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; the table goes beside it")
    parser.add_argument("--rows", type=Path, help="keep embeddings of tiles in this folder, for the next run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--photos", type=int, default=75, help="of each seed")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    given = parser.parse_args()
    plan = Plan(variants=given.variants, photos=dict.fromkeys(given.k, given.photos), seeds=given.seeds)
    with (
        tempfile.TemporaryDirectory() as temporary,
        GeoEngine.open(given.bundle, "planet", row_cache=given.rows or Path(temporary)) as engine,
    ):
        if engine.bundle.calibration is None:
            raise GeoEngineError(f"{given.bundle} has no calibration: run geoengine calibrate first")
        data = run(engine, plan, given.out)
    text = markdown(data)
    given.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
