"""What each part of the training recipe brings, on the planet: `python -m geoengine.bench.training_ablation`.

Every variant is trained from the same photo encoder, on the same photos, with the same number of encoded
tiles per level, which is what training costs: a variant whose photos bring two tiles each has half as many
epochs. Frozen activations are computed once for all. The figures, on photos that took no part:

- how often the own tile is the best of its parent's 16, by level;
- greedy: how often that is so at every level, and the own tile the best of all 256 at zoom 4, which is the
  search with k = 1;
- for the variants of `--searched`, the search itself with k = 16, on photos drawn as `geoengine evaluate
  planet` draws them, other ones for each seed, with both scores. The path score's temperatures are the
  training's; its weights are all 1.

A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geoengine.bench.accuracy import errors_km, wilson_share
from geoengine.bench.kept_tokens import Addresses, KeptEncoders
from geoengine.bench.readme import percent, table
from geoengine.bench.truth import PlanetPhotos
from geoengine.engine.calibration import Calibration, Fit, LevelFit
from geoengine.engine.manifest import encoder_name
from geoengine.engine.preprocess import to_square
from geoengine.engine.scoring.kinds import Score
from geoengine.engine.search import SearchConfig, search
from geoengine.engine.sources.planet import PlanetSource
from geoengine.engine.tiles import LEVELS, all_xy, center
from geoengine.export.encoders import load_encoder_folder
from geoengine.training.levels import own_tiles
from geoengine.training.negatives import tile_keys
from geoengine.training.photos import Geometry, Int64Array, Photos, UInt8Array
from geoengine.training.planet_photos import Planet
from geoengine.training.processes import Processes
from geoengine.training.recipe import RECIPES, Recipe, Schedule
from geoengine.training.start import Start, start_from_folder
from geoengine.training.towers import Head
from geoengine.training.trainer import TrainConfig, Trainer
from geoengine.training.validation import (
    ValidationSet,
    embed_tiles,
    sibling_keys,
    sibling_similarities,
)

PLACES, EVERY, VALIDATION = 3000, 8, 400
"""Training places of the planet, every how many clusters of 16 of them are taken, and validation places."""

TRAINER_VALIDATION, MEASURED = 100, 250
"""Validation photos that the trainer sees, for temperatures, and after them those that are measured."""

BUDGET = 6
"""Encoded tiles of each training photo and level."""

WITHIN_KM = 1.0

_PAPER = RECIPES["paper"]
_RIDGE = 1e-3
_FAST = replace(
    _PAPER,
    learning_rate=5e-4,
    projection_rate=4.0,
    weight_decay=0.02,
    schedule=Schedule.cosine,
    ridge=_RIDGE,
    calibrate=True,
)
"""The rates that the planet's first trainer had."""

VARIANTS: Mapping[str, Recipe] = {
    "paper": _PAPER,
    "paper + projection start": replace(_PAPER, ridge=_RIDGE),
    "faster rates + projection start (B)": _FAST,
    "B + siblings": replace(_FAST, siblings=1),
    "B + neighbours": replace(_FAST, neighbours=1),
    "B + smoothing": replace(_FAST, smoothing=0.25),
    "B + siblings + neighbours": replace(_FAST, siblings=1, neighbours=1),
}


class _Fewer:
    """Some of the planet's training and validation photos."""

    name = world = "planet"

    def __init__(self, planet: Planet) -> None:
        self._planet = planet

    def split(self, name: str) -> Photos:
        photos = self._planet.split(name)
        numbers = np.arange(len(photos.keys))
        if name == "valid":
            return _Part(photos, numbers[:TRAINER_VALIDATION])
        return _Part(photos, numbers[numbers // 16 % EVERY == 0])  # clusters stay whole


class _Part:
    """Some photos of a split, under their own keys."""

    def __init__(self, photos: Photos, rows: Int64Array) -> None:
        self._photos, self._rows = photos, rows
        self.identity = photos.identity
        self.keys, self.lng, self.lat = photos.keys[rows], photos.lng[rows], photos.lat[rows]

    def called(self, row: int) -> str:
        return self._photos.called(int(self._rows[row]))

    def read(self, rows: Int64Array) -> Iterator[tuple[Int64Array, UInt8Array]]:
        return self._photos.read(self._rows[rows])


def budgeted(recipe: Recipe) -> Recipe:
    """Return a recipe with as many epochs as the budget allows."""
    return replace(recipe, epochs=BUDGET // (1 + recipe.siblings + recipe.neighbours))


class Ablation:
    """The runs in the folder `work`, from the encoders in `folder`."""

    def __init__(self, work: Path, folder: Path) -> None:
        self._work = work
        self._processes = Processes.join("cpu")
        self._start: Start = start_from_folder(folder)
        geometry = Geometry(self._start.encoders.image_size, self._start.encoders.resize_mode)
        self._planet = Planet(geometry, places=PLACES, validation=VALIDATION)

    @property
    def places(self) -> int:
        """The number of training photos."""
        return len(_Fewer(self._planet).split("train").keys)

    def train(self, name: str, seed: int) -> Trainer:
        """Train a variant, or go on with it."""
        began = time.perf_counter()
        trainer = Trainer(
            self._start,
            _Fewer(self._planet),
            PlanetSource(),
            TrainConfig(
                out=self._folder(name, seed),
                recipe=budgeted(VARIANTS[name]),
                seed=seed,
                cache=self._work / "activations",
                sibling_photos=TRAINER_VALIDATION,
            ),
            processes=self._processes,
            say=lambda line: None,
            progress=lambda what, done, total: None,
        )
        trainer.run()
        _say(f"{name}, seed {seed}: trained in {time.perf_counter() - began:.0f} s")
        return trainer

    def heads(self, name: str, seed: int) -> tuple[dict[int, Head], dict[str, float]]:
        """Return the trained map encoders by zoom, and their logit scales."""
        encoders = load_encoder_folder(self._folder(name, seed) / "encoders")
        heads = {zoom: Head(encoders.towers[encoder_name(zoom)], self._start.trunk_layers) for zoom in LEVELS}
        return heads, dict(encoders.logit_scale)

    def descent(self, name: str, seed: int) -> dict[str, Any]:
        """Return how often the own tile wins among its siblings, by level, and at all levels."""
        heads, _ = self.heads(name, seed)
        trainer = self.train(name, seed)
        valid = self._planet.split("valid")
        measured = _Part(valid, np.arange(TRAINER_VALIDATION, TRAINER_VALIDATION + MEASURED))
        embeddings = trainer.embed_photos(measured)
        right = np.ones(MEASURED, dtype=bool)
        shares = {}
        for zoom in LEVELS:
            own = own_tiles(zoom, measured)
            if zoom == LEVELS[0]:
                everywhere = np.sort(tile_keys(all_xy(zoom)))
                trainer.tiles.prepare(zoom, everywhere)
                tiles = embed_tiles(heads[zoom], trainer.tiles, zoom, everywhere, "fp32")
                best = everywhere[(embeddings @ tiles.T).argmax(1).numpy()] == own
            else:
                trainer.tiles.prepare(zoom, sibling_keys(own))
                pairs = ValidationSet(zoom=zoom, photos=embeddings, own=own, with_siblings=MEASURED)
                similarity, target = sibling_similarities(heads[zoom], trainer.tiles, pairs, "fp32")
                best = (similarity.argmax(1) == target).numpy()
            shares[str(zoom)] = float(best.mean())
            right &= best
        return {"siblings": shares, "greedy": int(right.sum()), "photos": MEASURED}

    def search(self, name: str, seed: int, count: int, ks: Sequence[int]) -> dict[str, Any]:
        """Return how many of `count` photos the search places within 1 km, by score and k."""
        heads, scales = self.heads(name, seed)
        trainer = self.train(name, seed)
        levels = {zoom: LevelFit(scale=scales[encoder_name(zoom)]) for zoom in LEVELS}
        encoders = KeptEncoders(heads, trainer.tiles)
        truth = list(PlanetPhotos(count, seed))
        side = self._start.encoders.image_size
        squares = np.stack([to_square(photo.read().pixels, side) for photo in truth])
        queries = trainer.frozen.embeddings(squares).float().numpy()
        hits: dict[str, dict[str, int]] = {}
        for score in Score:
            for k in ks:
                found = search(
                    queries,
                    Addresses(),
                    encoders,
                    SearchConfig(k=k, score=score, top=1),
                    calibration=Calibration(fits={"plain": Fit(levels=levels)}),
                )
                answers = [center(photo_levels[-1].beam[0].tile) for photo_levels in found]
                errors = errors_km(answers, [photo.place for photo in truth])
                hits.setdefault(score.value, {})[str(k)] = int((errors <= WITHIN_KM).sum())
        return {"photos": count, "hits": hits}

    def _folder(self, name: str, seed: int) -> Path:
        return self._work / f"{name.replace(' ', '-')}-{seed}"


def measure(
    ablation: Ablation,
    seeds: Sequence[int],
    names: Sequence[str],
    searched: Sequence[str],
    count: int,
    ks: Sequence[int],
) -> dict[str, Any]:
    """Train and measure variants with all seeds."""
    runs = []
    for seed in seeds:
        for name in names:
            ablation.train(name, seed)
            run: dict[str, Any] = {"variant": name, "seed": seed, "recipe": asdict(budgeted(VARIANTS[name]))}
            run["descent"] = ablation.descent(name, seed)
            if name in searched:
                run["search"] = ablation.search(name, seed, count, ks)
            _say(json.dumps({key: value for key, value in run.items() if key != "recipe"}))
            runs.append(run)
    return {"schema": 1, "places": ablation.places, "budget": BUDGET, "runs": runs}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the figures of a report as Markdown tables."""
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        by_variant.setdefault(run["variant"], []).append(run)
    seeds = sorted({run["seed"] for run in report["runs"]})
    rows = []
    for name, runs in by_variant.items():
        greedy = wilson_share(
            sum(run["descent"]["greedy"] for run in runs), sum(run["descent"]["photos"] for run in runs)
        )
        siblings = [
            f"{100 * statistics.mean(run['descent']['siblings'][str(zoom)] for run in runs):.1f}"
            for zoom in LEVELS
        ]
        spread = [100 * run["descent"]["greedy"] / run["descent"]["photos"] for run in runs]
        by_seed = " / ".join(f"{share:.1f}" for share in spread)
        rows.append([name, *siblings, percent(greedy.value), by_seed])
    header = ["variant", *(f"z{zoom}" for zoom in LEVELS), "all levels (k = 1)", "by seed"]
    text = (
        f"{report['places']} training photos, {report['budget']} encoded tiles for each at each level, seeds "
        f"{', '.join(map(str, seeds))}. Own tile first among the 16 of its parent (zoom 4: of all 256), % of "
        f"{MEASURED} held-out photos, mean of the seeds:\n" + table(header, rows)
    )
    found = [row for name, runs in by_variant.items() for row in _search_rows(name, runs)]
    if found:
        ks = list(found[0][2])
        rows = [[name, score, *(_share(*shares[k]) for k in ks)] for name, score, shares in found]
        photos = found[0][2][ks[0]][1]
        text += f"\nThe search: within 1 km, {photos} photos over the seeds, with 95 % intervals:\n"
        text += table(["variant", "score", *(f"k = {k}" for k in ks)], rows)
    return text


def _search_rows(
    name: str, runs: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, dict[str, tuple[int, int]]]]:
    """Yield for each score the (hits, photos) of every k."""
    found = [run["search"] for run in runs if "search" in run]
    for score in found[0]["hits"] if found else ():
        yield (
            name,
            score,
            {
                k: (sum(one["hits"][score][k] for one in found), sum(one["photos"] for one in found))
                for k in found[0]["hits"][score]
            },
        )


def _share(hits: int, photos: int) -> str:
    share = wilson_share(hits, photos)
    return f"{percent(share.value)} ({percent(share.low)} – {percent(share.high)})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the options, run, and write `training-ablation.json` and `.md` to a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs and activations")
    parser.add_argument("--start", type=Path, default=Path("training/weights/planet"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/training"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--searched", nargs="*", default=["paper", "paper + projection start"])
    parser.add_argument("--photos", type=int, default=70, help="searched photos of each seed")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(
        Ablation(options.work, options.start),
        options.seeds,
        options.variants,
        options.searched,
        options.photos,
        options.k,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ablation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.out / "ablation.md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
