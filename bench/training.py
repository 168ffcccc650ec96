"""What keeping the frozen layers' activations saves in training: `python -m geoengine.bench.training`.

A full-size model with random weights takes steps on random pictures that are in memory already, so reading
and decoding are left out, with activations kept on disk and with all of them computed at every step. The two
take turns; the figures are medians, of wall time and of processor time, which other work on the machine
disturbs less. Needs the train extra.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from geoengine.bench.readme import table
from geoengine.bench.suite.machine import describe
from geoengine.bench.suite.results import machine_folder
from geoengine.engine.sources import TileBatch
from geoengine.engine.sources.planet import PlanetSource
from geoengine.training.contrastive import Batch, compute_gradients
from geoengine.training.features import (
    CachedPhotos,
    CachedTiles,
    ComputedPhotos,
    ComputedTiles,
    Frozen,
    PhotoFeatures,
    TileFeatures,
)
from geoengine.training.negatives import tile_keys
from geoengine.training.photos import Int64Array, UInt8Array
from geoengine.training.processes import Processes, choose_precision
from geoengine.training.start import CLIP_INITIAL_SCALE, Start, log_scale_of, start_from_clip
from geoengine.training.towers import Head

ZOOM = 16


class _Noise(PlanetSource):
    """Tiles of noise, drawn before they are asked for; tile (x, 0) is picture x."""

    def __init__(self, pixels: UInt8Array) -> None:
        self._pixels = pixels

    @property
    def identity(self) -> str:
        return "noise"

    def read(self, z: int, xy: Int64Array) -> Iterator[TileBatch]:
        yield TileBatch(np.arange(len(xy)), self._pixels[xy[:, 0]])


@dataclass(frozen=True, slots=True, eq=False)
class _Pictures:
    """Photos of noise, as a split."""

    pixels: UInt8Array
    identity: str = "noise"

    @property
    def keys(self) -> np.ndarray:
        return np.arange(len(self.pixels), dtype=np.uint64)

    @property
    def lng(self) -> np.ndarray:
        return np.zeros(len(self.pixels))

    @property
    def lat(self) -> np.ndarray:
        return np.zeros(len(self.pixels))

    def called(self, row: int) -> str:
        return f"noise {row}"

    def read(self, rows: Int64Array) -> Iterator[tuple[Int64Array, UInt8Array]]:
        yield np.arange(len(rows)), self.pixels[rows]


def measure(start: Start, *, batch: int, pictures: int, rounds: int, precision: str) -> dict[str, Any]:
    """Time steps of `batch` photos and tiles, of `pictures` in all, with and without kept activations."""
    processes = Processes.join("auto")
    width = int(start.tower.positional_embedding.shape[1])
    frozen = Frozen(
        tower=start.tower.to(processes.device),
        trunk_layers=start.trunk_layers,
        mean=start.encoders.mean,
        std=start.encoders.std,
        digest=start.digest,
        device=processes.device,
        precision=choose_precision(precision, processes.device, width),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, pictures, frozen.side, frozen.side, 3), np.uint8)
    source, photos = _Noise(pixels[0]), _Pictures(pixels[1])
    keys = tile_keys(np.stack([np.arange(pictures), np.zeros(pictures, np.int64)], axis=1))
    head = Head(start.tower, start.trunk_layers).to(processes.device)
    scale = nn.Parameter(log_scale_of(CLIP_INITIAL_SCALE).to(processes.device))
    optimizer = torch.optim.AdamW([*head.parameters(), scale], lr=1e-4)

    def step(tiles: TileFeatures, embeddings: PhotoFeatures, number: int) -> None:
        rows = (number * batch + np.arange(batch)) % pictures
        tokens = tiles.tokens(ZOOM, keys[rows])
        one = Batch(
            photos=embeddings.embeddings(rows),
            target=torch.arange(batch, device=processes.device),
            tiles=batch,
            tokens=lambda part: tokens[part],
        )
        loss = compute_gradients(head, scale, one, processes, 1, frozen.precision)
        optimizer.step()
        if not math.isfinite(loss):
            raise ValueError("the loss is not a number")

    with tempfile.TemporaryDirectory() as folder:
        kept = CachedTiles(frozen, source, Path(folder), processes, _silent)
        kept_photos = CachedPhotos(frozen, photos, Path(folder), processes, _silent)
        kept.prepare(ZOOM, keys)
        kept_photos.prepare()
        ways = {
            "kept": lambda number: step(kept, kept_photos, number),
            "computed": lambda number: step(
                ComputedTiles(frozen, source), ComputedPhotos(frozen, photos), number
            ),
        }
        seconds = _take_turns(ways, rounds)
    return {
        "schema": 1,
        "machine": describe(),
        "model": start.encoders.model,
        "device": processes.device.type,
        "precision": frozen.precision,
        "threads": torch.get_num_threads(),
        "batch": batch,
        "rounds": rounds,
        "bytes_per_tile": 2 * math.prod(frozen.token_shape),
        "wall_s": {way: one[0] for way, one in seconds.items()},
        "processor_s": {way: one[1] for way, one in seconds.items()},
        "speed_up_wall": seconds["computed"][0] / seconds["kept"][0],
        "speed_up_processor": seconds["computed"][1] / seconds["kept"][1],
    }


def _take_turns(ways: dict[str, Callable[[int], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median wall and processor seconds of each way; the first round warms up."""
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            run(number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[way].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        way: (statistics.median(w for w, _ in times[1:]), statistics.median(p for _, p in times[1:]))
        for way, times in taken.items()
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    rows = [
        [
            f"activations {way}",
            f"{report['batch'] / report['wall_s'][way]:.1f}",
            f"{report['batch'] / report['processor_s'][way]:.1f}",
        ]
        for way in ("computed", "kept")
    ]
    rows.append(["times", f"{report['speed_up_wall']:.1f}", f"{report['speed_up_processor']:.1f}"])
    title = (
        f"{report['model']}, random weights, {report['precision']}, {report['device']}, "
        f"{report['threads']} thread, batch {report['batch']}, median of {report['rounds']} steps by turns:"
    )
    return f"{title}\n" + table(["", "photos a second", "photos a processor second"], rows)


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def main() -> None:
    """Parse the options, measure, and write `training.json` and `.md` to the machine's folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = measure(
        start_from_clip(options.model, "none"),
        batch=options.batch,
        pictures=options.pictures,
        rounds=options.rounds,
        precision=options.precision,
    )
    folder = machine_folder(options.out)
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "training.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


if __name__ == "__main__":
    main()
