"""Small bundles: their encoders, a build of them, and builds that take their graphs from it."""

import hashlib
import shutil
from pathlib import Path

import torch
from made_encoders import SMALL

from geoengine.export import encoders, onnx_graphs
from geoengine.export.build import build_engines
from geoengine.export.config import BuildConfig

NAMES = ("photo", "z04", "z06")


def save_set(path: Path, *, seed: int = 5, changed: str | None = None) -> Path:
    """A folder of small random encoders; `changed` names one to give another projection."""
    torch.manual_seed(seed)
    trunk = SMALL.build().state_dict()
    heads = {}
    for name in NAMES:
        state = SMALL.build().state_dict()
        heads[name] = {key: t for key, t in state.items() if not encoders.in_trunk(key, 1)}
    if changed is not None:
        heads[changed]["proj"] = torch.randn(32, 24)
    encoders.save_encoder_folder(
        path, vision=SMALL, trunk=trunk, heads=heads, trunk_layers=1,
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), logit_scale={"z04": 20.0, "z06": 30.5},
    )  # fmt: skip
    return path


def build_small(folder: Path):
    """Build a bundle with trunks for 16 and 24 pixels from `folder`/set; returns folder, report and steps."""
    steps = []
    config = BuildConfig(encoder_folder=save_set(folder / "set"), out=folder / "bundle", input_sizes=(24,))
    report = build_engines(config, lambda *step: steps.append(step))
    return folder, report, steps


def reuse_graphs(monkeypatch, source: Path) -> None:
    """Let builds take their graphs from a folder instead of exporting: the same architecture, and quick."""

    def copy(folder: Path, start: str) -> list[Path]:
        return [Path(shutil.copy(file, folder)) for file in source.iterdir() if file.name.startswith(start)]

    def write_trunks(trunks, folder, variant):
        files = copy(folder, "trunk")
        return {side: next(f for f in files if f".{side}.fp32.onnx" in f.name) for side in trunks}

    def write_heads(heads, folder, variant):
        files = copy(folder, "head_")
        return {name: next(f for f in files if f"{name}.fp32.onnx" in f.name) for name, _ in heads}

    monkeypatch.setattr(onnx_graphs, "write_trunks", write_trunks)
    monkeypatch.setattr(onnx_graphs, "write_heads", write_heads)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }
