"""Speed and agreement of ViT-B/32 on a CPU: our backends beside PyTorch, one run, the same pictures.

Run as `python -m geoengine.bench.encoders_cpu`. Weights are random, so nothing is downloaded; a second tower
has outlier channels as trained ones do, which random weights lack. Every contender takes uint8 pictures and
gives unit embeddings.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import Backend
from geoengine.engine.backends.onnxruntime import OnnxRuntimeCpu
from geoengine.engine.backends.openvino import OpenVino
from geoengine.engine.backends.sessions import load_onnxruntime
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.cores import available_cores
from geoengine.engine.manifest import PHOTO, SCHEMA, Graphs, Manifest, Variant
from geoengine.engine.photos import expand_photo_paths, read_photo
from geoengine.engine.preprocess import to_square
from geoengine.engine.sources import planet
from geoengine.engine.tiles import LEVELS, LngLat, tile_at

MODEL = "ViT-B-32-quickgelu"
BASE = "PyTorch fp32 eager"
SIDE = 224
OUTLIERS = {87: 20.0, 133: -30.0, 363: 45.0, 481: -60.0, 691: 80.0, 715: -100.0}
"""Residual channels that a tower with outliers has, and how many times as large as the rest they become."""

_TILES, _PHOTOS, _BEST = 256, 48, 16
_TRUNK_LAYERS = 10

Encode = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def measure(tiles: NDArray[np.uint8], photos: NDArray[np.uint8], batch: int, rounds: int) -> dict[str, Any]:
    """Time every contender, interleaved, and compare it with PyTorch fp32; returns JSON-ready figures.

    `photos` are the queries, `tiles` what is ranked; both uint8[n, 224, 224, 3].
    """
    import torch

    torch.set_num_threads(available_cores())
    agreement: dict[str, dict[str, Any]] = {}
    speeds: dict[str, float] = {}
    for kind in ("random", "outliers"):
        tower, mean, std = _tower(outliers=kind == "outliers")
        with tempfile.TemporaryDirectory() as folder:
            contenders = _contenders(tower, mean, std, Path(folder))
            agreement[kind] = _agreement(contenders, tiles, photos, batch)
            if kind == "random":
                speeds = _images_per_second(contenders, tiles[:batch], rounds)
    rows = [
        {
            "name": name,
            "images_per_second": speed,
            "ratio": speed / speeds[BASE],
            **{kind: figures[name] for kind, figures in agreement.items()},
        }
        for name, speed in speeds.items()
    ]
    return {"model": MODEL, "batch": batch, "rounds": rounds, "machine": machine(), "rows": rows}


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table; overlaps are mean and least, over all queries."""
    lines = [
        "| encoder | images/s | to eager | min cosine | overlap | outliers: min cosine | overlap | batch |",
        "| --- |" + " ---: |" * 7,
    ]
    for row in figures["rows"]:
        cells = [f"{row['images_per_second']:.1f}", f"{row['ratio']:.2f}x"]
        for kind in ("random", "outliers"):
            own = row[kind]
            cells += [f"{own['min_cosine']:.5f}", f"{own['mean_overlap']:.3f} ({own['min_overlap']:.2f})"]
        worst = max(row[kind]["batch_difference"] for kind in ("random", "outliers"))
        lines.append(f"| {row['name']} | " + " | ".join([*cells, f"{worst:.0e}"]) + " |")
    return "\n".join(lines) + "\n"


def drawn_tiles(count: int = _TILES, seed: int = 3) -> NDArray[np.uint8]:
    """Return tiles of the planet's land at all levels; others than int8 is calibrated on."""
    rng = np.random.default_rng(seed)
    tiles = []
    for lng, lat in _land(count, rng):
        at = tile_at(LngLat(lng, lat), int(rng.choice(LEVELS)))
        tiles.append(planet.tile(at.z, at.x, at.y, size=SIDE))
    return np.stack(tiles)


def drawn_photos(count: int = _PHOTOS, seed: int = 4) -> NDArray[np.uint8]:
    """Return photos of the planet's land; others than int8 is calibrated on."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            to_square(planet.photo(lat, lng, seed + number, height=SIDE), SIDE)
            for number, (lng, lat) in enumerate(_land(count, rng))
        ]
    )


def _land(count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    while len(found) < count:
        lng, lat = float(rng.uniform(-180, 180)), float(rng.uniform(-65, 65))
        if planet.is_land([lng], [lat])[0]:
            found.append((lng, lat))
    return found


def _from_folder(folder: Path) -> NDArray[np.uint8]:
    return np.stack([to_square(read_photo(path).pixels, SIDE) for path in expand_photo_paths([folder])])


def _tower(*, outliers: bool) -> tuple[Any, Any, Any]:
    """Return a tower with random weights, and the mean and std of its pictures."""
    import torch

    from geoengine.export.checkpoints import load_clip_encoders

    torch.manual_seed(0)
    encoders = load_clip_encoders(model=MODEL, pretrained="none", levels=(4,))
    tower = encoders.towers[PHOTO]
    if outliers:
        with torch.no_grad():
            _add_outliers(tower)
    return tower, encoders.mean, encoders.std


def _add_outliers(tower: Any) -> None:  # noqa: ANN401 - open_clip is untyped
    """Give a tower outlier channels: the same ones for all tokens, of one sign, growing from the first block.

    As described in LLM.int8 (Dettmers et al., 2022) and SmoothQuant (Xiao et al., 2023).
    """
    import torch

    blocks = tower.transformer.resblocks
    generator = torch.Generator().manual_seed(7)
    for block in blocks:
        for norm in (block.ln_1, block.ln_2):
            norm.weight += 0.15 * torch.randn(norm.weight.shape, generator=generator)
            norm.bias += 0.1 * torch.randn(norm.bias.shape, generator=generator)
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.bias += 0.05 * torch.randn(layer.bias.shape, generator=generator)
    for channel, size in OUTLIERS.items():
        tower.class_embedding[channel] += 0.1 * size
        tower.positional_embedding[:, channel] += 0.1 * size
        for block in blocks:
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                layer.weight[channel] *= 0.12 * abs(size)
                layer.bias[channel] += 0.75 * size / len(blocks)
        tower.proj[channel] /= abs(size)  # or all pictures would have nearly one embedding


def _contenders(tower: Any, mean: Any, std: Any, folder: Path) -> dict[str, Encode]:  # noqa: ANN401
    import torch

    from geoengine.export.calibration import calibration_pictures
    from geoengine.export.int8 import quantize_graphs
    from geoengine.export.model import Head, Trunk
    from geoengine.export.onnx_graphs import write_heads, write_trunks

    trunk = Trunk(tower, blocks=_TRUNK_LAYERS, side=SIDE, mean=mean, std=std)
    head = Head(tower, trunk_layers=_TRUNK_LAYERS, mean=mean, std=std)
    trunks = write_trunks({SIDE: trunk}, folder, variant=Variant.fp32)
    heads = write_heads([(PHOTO, head)], folder, variant=Variant.fp32)
    small = quantize_graphs(trunks, heads, folder, calibration_pictures(None, SIDE))
    bundle = _bundle(folder, {Variant.fp32: (trunks, heads), Variant.int8: small})
    files = (trunks[SIDE], heads[PHOTO])
    backends: dict[str, Backend] = {
        "ONNX Runtime fp32": OnnxRuntimeCpu(bundle, precision=Variant.fp32),
        "ONNX Runtime int8": OnnxRuntimeCpu(bundle, precision=Variant.int8),
        "OpenVINO int8": OpenVino(bundle),
    }
    return {
        BASE: _torch(tower, mean, std, torch.float32),
        "PyTorch bf16 eager": _torch(tower, mean, std, torch.bfloat16),
        "ONNX Runtime dynamic int8": _dynamic(files, folder),
        "OpenVINO bf16": _openvino_bf16(files),
        **{name: partial(backend.encode, PHOTO) for name, backend in backends.items()},
    }


class _MemoryBundle(EngineBundle):
    """A bundle whose manifest is in no file, so that nobody can replace it."""

    __slots__ = ()

    def check_unchanged(self) -> None:
        """Accept it as it is."""


def _bundle(folder: Path, graphs: Mapping[Variant, tuple[dict[int, Path], dict[str, Path]]]) -> EngineBundle:
    """Return a bundle of the photo encoder alone, in memory."""
    manifest = Manifest(
        schema=SCHEMA,
        geoengine="",
        model=MODEL,
        pretrained="none",
        world="earth",
        levels=(),
        embed_dim=512,
        image_size=SIDE,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        resize_mode="shortest",
        logit_scale={},
        graphs={
            variant: Graphs(
                {side: path.name for side, path in trunks.items()},
                {name: path.name for name, path in heads.items()},
            )
            for variant, (trunks, heads) in graphs.items()
        },
        preferred={},
        weights="",
        files={},
        tools={},
        parity={},
    )
    return _MemoryBundle(folder, manifest)


def _torch(tower: Any, mean: Any, std: Any, dtype: Any) -> Encode:  # noqa: ANN401
    import copy

    import torch

    module = tower if dtype == torch.float32 else copy.deepcopy(tower).to(dtype)
    centre, spread = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def encode(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - centre) / spread
            embeddings = module(batch.to(dtype)).float()
            return np.asarray(torch.nn.functional.normalize(embeddings, dim=-1).numpy())

    return encode


def _dynamic(files: tuple[Path, Path], folder: Path) -> Encode:
    """Return ONNX Runtime with scales taken from each batch, the usual one-line quantisation."""
    import onnx

    ort = load_onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    sessions = []
    for file in files:
        whole, target = folder / f"whole.{file.name}", folder / f"dynamic.{file.name}"
        onnx.save(onnx.load(file), whole)
        quantize_dynamic(whole, target, weight_type=QuantType.QInt8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = available_cores()
        options.log_severity_level = 3
        sessions.append(ort.InferenceSession(target, options, providers=["CPUExecutionProvider"]))

    def encode(value: NDArray[Any]) -> NDArray[np.float32]:
        for session in sessions:
            (value,) = session.run(None, {session.get_inputs()[0].name: value})
        return value

    return encode


def _openvino_bf16(files: tuple[Path, Path]) -> Encode:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": available_cores()}
    core = openvino.Core()
    requests = [core.compile_model(file, "CPU", options).create_infer_request() for file in files]

    def encode(value: NDArray[Any]) -> NDArray[np.float32]:
        for request in requests:
            value = np.array(request.infer([value])[0])
        return value

    return encode


def _agreement(
    contenders: Mapping[str, Encode], tiles: NDArray[np.uint8], photos: NDArray[np.uint8], batch: int
) -> dict[str, Any]:
    """Compare with the first contender: cosines, and which of the tiles are the best for each photo."""
    exact: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    found = {}
    for name, encode in contenders.items():
        rows = _all(encode, photos, batch), _all(encode, tiles, batch)
        exact = exact or rows
        cosines = np.concatenate(
            [(a.astype(float) * b).sum(1) / np.linalg.norm(a) for a, b in _pairs(rows, exact)]
        )
        shares = [_overlap(rows, exact, query) for query in range(len(photos))]
        alone = np.concatenate([encode(photos[i : i + 1]) for i in range(4)])
        among = np.stack([encode(photos[: batch + i])[i] for i in range(4)])
        found[name] = {
            "min_cosine": float(cosines.min()),
            "mean_cosine": float(cosines.mean()),
            "mean_overlap": float(np.mean(shares)),
            "min_overlap": float(np.min(shares)),
            "batch_difference": float(np.abs(alone - among).max()),
        }
        print(name, found[name], flush=True)
    return found


def _all(encode: Encode, pictures: NDArray[np.uint8], batch: int) -> NDArray[np.float32]:
    return np.concatenate([encode(pictures[i : i + batch]) for i in range(0, len(pictures), batch)])


def _pairs(rows: tuple[Any, Any], exact: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    return [(a[i : i + 1], b[i : i + 1]) for a, b in zip(rows, exact, strict=True) for i in range(len(a))]


def _overlap(rows: tuple[Any, Any], exact: tuple[Any, Any], query: int) -> float:
    """Return the share of the best tiles for a photo that both embeddings agree on."""
    best = [set(np.argsort(-(t @ q[query]), kind="stable")[:_BEST]) for q, t in (rows, exact)]
    return len(best[0] & best[1]) / _BEST


def _images_per_second(
    contenders: Mapping[str, Encode], pictures: NDArray[np.uint8], rounds: int
) -> dict[str, float]:
    """Return medians, all contenders in turn in every round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, encode in contenders.items():
            start = time.perf_counter()
            encode(pictures)
            times[name].append(time.perf_counter() - start)
    return {name: len(pictures) / statistics.median(own) for name, own in times.items()}


def machine() -> dict[str, Any]:
    """Return what the figures were measured with and on."""
    import openvino
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": openvino.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        "cores": available_cores(),
        "torch": torch.__version__,
        "onnxruntime": load_onnxruntime().__version__,
        "openvino": openvino.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """Measure, print the table, and write the figures beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiles", type=Path, help="a folder of map tiles instead of the planet's")
    parser.add_argument("--photos", type=Path, help="a folder of photos instead of the planet's")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"), help="folder of results")
    options = parser.parse_args()
    tiles = drawn_tiles() if options.tiles is None else _from_folder(options.tiles)
    photos = drawn_photos() if options.photos is None else _from_folder(options.photos)
    figures = measure(tiles, photos, options.batch, options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "encoders.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (options.out / "encoders.md").write_text(table(figures), encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
