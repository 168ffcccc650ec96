"""Throughput of ViT-B/32 on a GPU: our backends beside PyTorch, one run, the same pictures.

Run as `python -m geoengine.bench.encoders_gpu`. Weights are random, so nothing is downloaded. Every contender
takes uint8 pictures in ordinary memory and gives embeddings in ordinary memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import ONNXRUNTIME_CUDA, TENSORRT, open_backend
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError
from geoengine.engine.manifest import PHOTO, Variant

MODEL = "ViT-B-32-quickgelu"
ROUNDS = 15
WARM_UP = 5

Encode = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def measure(batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Time every contender at every batch, interleaved; returns JSON-ready figures.

    Raises RuntimeError without a GPU that PyTorch can use.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU here")
    with tempfile.TemporaryDirectory() as folder:
        bundle = _build(Path(folder) / "bundle")
        contenders = _ours(bundle) | _torch()
        pictures = np.random.default_rng(0).integers(0, 256, (max(batches), 224, 224, 3), dtype=np.uint8)
        reference = contenders["PyTorch fp32"](pictures[:64])
        rows = [
            {
                "name": name,
                "batch": batch,
                "images_per_second": batch / seconds,
                "min_cosine": float((encode(pictures[:64]) * reference).sum(1).min()),
            }
            for batch in batches
            for (name, encode), seconds in zip(
                contenders.items(),
                _interleaved([*contenders.values()], pictures[:batch], rounds),
                strict=True,
            )
        ]
    return {"model": MODEL, "rounds": rounds, "machine": _machine(), "rows": rows}


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table, images per second by batch."""
    batches = sorted({row["batch"] for row in figures["rows"]})
    names = list(dict.fromkeys(row["name"] for row in figures["rows"]))
    lines = [
        "| encoder | " + " | ".join(f"batch {batch}" for batch in batches) + " | min cosine to fp32 |",
        "| --- |" + " ---: |" * (len(batches) + 1),
    ]
    for name in names:
        own = [row for row in figures["rows"] if row["name"] == name]
        speeds = " | ".join(f"{row['images_per_second']:,.0f}" for row in own)
        lines.append(f"| {name} | {speeds} | {min(row['min_cosine'] for row in own):.6f} |")
    return "\n".join(lines) + "\n"


def _build(path: Path) -> EngineBundle:
    from geoengine.export.build import build_engines
    from geoengine.export.config import BuildConfig

    build_engines(
        BuildConfig(
            model=MODEL, pretrained="none", precisions=("fp16",), levels=(4,), input_sizes=(), out=path
        )
    )
    return EngineBundle.open(path)


def _ours(bundle: EngineBundle) -> dict[str, Encode]:
    """Return the photo encoder of every GPU backend that runs here."""
    found: dict[str, Encode] = {}
    for name, precision in (
        (TENSORRT, Variant.fp16),
        (ONNXRUNTIME_CUDA, Variant.fp16),
        (ONNXRUNTIME_CUDA, Variant.fp16_attention),
    ):
        try:
            backend = open_backend(bundle, backend=name, precision=precision)
        except BackendError as error:
            print(f"not measured: {name} {precision}: {error}")
            continue
        found[f"{name} {precision}"] = partial(backend.encode, PHOTO)
    return found


def _torch() -> dict[str, Encode]:
    """Return the same tower in PyTorch, with open_clip's normalisation on the GPU."""
    import torch

    from geoengine.export.checkpoints import load_clip_encoders

    encoders = load_clip_encoders(model=MODEL, pretrained="none", levels=(4,))
    mean = torch.tensor(encoders.mean, device="cuda")[:, None, None]
    std = torch.tensor(encoders.std, device="cuda")[:, None, None]

    def contender(tower: Any, dtype: torch.dtype) -> Encode:  # noqa: ANN401 - compiled modules have no type
        def encode(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            with torch.inference_mode():
                batch = torch.from_numpy(pixels).cuda().permute(0, 3, 1, 2)
                embeddings = tower(((batch / 255 - mean) / std).to(dtype)).float()
                unit = torch.nn.functional.normalize(embeddings, dim=-1)
                return np.asarray(unit.cpu().numpy())

        return encode

    tower = encoders.towers[PHOTO].cuda()
    half = load_clip_encoders(model=MODEL, pretrained="none", levels=(4,)).towers[PHOTO].cuda().half()
    return {
        "PyTorch fp16 eager": contender(half, torch.float16),
        "PyTorch fp16 torch.compile": contender(torch.compile(half), torch.float16),
        "PyTorch fp32": contender(tower, torch.float32),
    }


def _interleaved(contenders: Sequence[Encode], pixels: NDArray[np.uint8], rounds: int) -> list[float]:
    """Return the median seconds of each contender, all of them in turn in every round."""
    times: list[list[float]] = [[] for _ in contenders]
    for round_number in range(WARM_UP + rounds):
        for encode, own in zip(contenders, times, strict=True):
            start = time.perf_counter()
            encode(pixels)
            if round_number >= WARM_UP:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def _machine() -> dict[str, str]:
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """Measure, print the table, and write the figures beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of results")
    options = parser.parse_args()
    figures = measure(options.batches, options.rounds)
    folder = options.out / figures["machine"]["gpu"].lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoders.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (folder / "encoders.md").write_text(table(figures), encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
