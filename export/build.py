"""Building engine bundles: load, export, check, and only then put in place."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoengine.engine.backends import ONNXRUNTIME_CPU, open_backend
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import ExportError
from geoengine.engine.extras import require_extra
from geoengine.engine.manifest import MANIFEST, PHOTO, SCHEMA, Variant, encoder_name
from geoengine.engine.tiles import LEVELS

if TYPE_CHECKING:
    from geoengine.export.encoders import EncoderSet
    from geoengine.export.parity import Measurement

Progress = Callable[[int, int, str], None]
"""Called with the steps done, their number, and what comes next ("" at the end)."""

PRECISIONS = ("fp32",)
EARTH_SIDES = (256, 512)
"""Sides in pixels of the usual map tiles, besides the encoders' own."""

_NEEDED = ("torch", "open_clip", "onnx", "onnxscript", "safetensors")
_SPARE_BYTES = 10_000_000  # resize matrices, graphs, manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What to build.

    Either `model`, `pretrained` (a tag, a weights file, or "none" for random weights) and perhaps
    `checkpoints` (a folder of fine-tuned map encoders), or `encoder_folder` (one that `save_encoder_folder`
    wrote).
    `input_sizes` are the sides in pixels of the pictures that the bundle takes without a resize before it;
    the encoders' own is always there. None stands for all levels of the encoders, and the usual tile sizes.
    """

    model: str = "ViT-B-32-quickgelu"
    pretrained: str = "openai"
    checkpoints: Path | None = None
    encoder_folder: Path | None = None
    precision: str = "fp32"
    input_sizes: tuple[int, ...] | None = None
    out: Path = Path("engines")
    levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ExportError(
                f"unknown precision {self.precision!r}: this version has {', '.join(PRECISIONS)}"
            )
        if self.checkpoints is not None and self.encoder_folder is not None:
            raise ExportError("give either a folder of checkpoints or a folder of encoders, not both")
        if any(not 1 <= side <= 4096 for side in self.input_sizes or ()):
            raise ExportError(
                f"input sizes must be from 1 to 4096 pixels, got {list(self.input_sizes or ())}"
            )
        levels = self.levels
        if levels is not None and (not levels or list(levels) != sorted(set(levels)) or levels[0] < 0):
            raise ExportError(f"levels must increase strictly from 0 or more, got {list(levels)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRow:
    """One file of a bundle: its bytes and, where it was measured, its agreement and speed.

    Cosines are to PyTorch fp32: a trunk's over all encoders at its picture side, a head's over all sides.
    Speeds are of trunk and head together on this machine's CPU: a trunk's with the photo's head, a head's at
    the encoders' own side.
    """

    artifact: str
    precision: str
    min_cosine: float | None = None
    mean_cosine: float | None = None
    images_per_second: float | None = None
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """What was built or verified; `bytes` is the size of the whole bundle, `seconds` what the work took."""

    path: Path
    model: str
    pretrained: str
    world: str
    rows: tuple[ReportRow, ...]
    bytes: int
    seconds: float

    @property
    def random(self) -> bool:
        """Whether the weights are random, so that nothing but speed means anything."""
        return self.pretrained == "none"


def build_engines(config: BuildConfig, progress: Progress | None = None) -> BuildReport:
    """Build the bundle `config.out` and return what was measured.

    Everything is written to a temporary folder beside `config.out`, checked against PyTorch through the
    bundle's own CPU backend, and only then put in place; an existing bundle is replaced only then. Raises
    ExportError when the encoders cannot be loaded or exported, when the disk is too small, or when an encoder
    does not agree with PyTorch; `config.out` is then as before.
    """
    require_extra("export", _NEEDED, "building engines")
    from geoengine.export.encoders import replace_folder

    start = time.perf_counter()
    target = config.out.absolute()
    _check_target(target)
    steps = _Steps(progress)
    steps("load the encoders")
    encoders = _load(config)
    sides = _sides(config, encoders)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, encoders)
    steps.total = 3 + len(encoders.towers) * len(sides)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        manifest = _write_graphs(staging, encoders, sides, config.precision, steps)
        _write_manifest(staging, manifest)
        results = _measure(EngineBundle.open(staging, verify=False), encoders, sides, steps)
        manifest["parity"] = {config.precision: _parity_table(results)}
        _write_manifest(staging, manifest)
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    steps("")
    return _report(target, manifest, results, start)


def verify_bundle(path: str | Path, progress: Progress | None = None) -> BuildReport:
    """Check a bundle again: checksums, valid graphs, unit embeddings that do not depend on their batch.

    The weights that it was built from are not needed; cosines in the result are those that the manifest
    recorded. Raises BundleError for a damaged bundle, ExportError for one that fails a check.
    """
    require_extra("export", _NEEDED, "building engines")
    from geoengine.export.onnx_graphs import check_graph

    start = time.perf_counter()
    steps = _Steps(progress)
    steps("read the bundle")
    bundle = EngineBundle.open(path)
    graphs = bundle.manifest.graphs[Variant.fp32].files()
    sides = tuple(sorted(bundle.manifest.graphs[Variant.fp32].trunks))
    steps.total = 1 + len(graphs) + len(bundle.manifest.graphs[Variant.fp32].heads) * len(sides)
    for name in graphs:
        steps(f"check {name}")
        check_graph(bundle.path / name)
    results = _measure(bundle, None, sides, steps)
    steps("")
    manifest = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))
    return _report(bundle.path, manifest, results, start)


class _Steps:
    """Counts steps and tells the caller of each; `total` is 0 until it is known."""

    def __init__(self, progress: Progress | None) -> None:
        self.total = 0
        self._done = -1
        self._progress = progress

    def __call__(self, doing: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self.total, doing)


def _check_target(target: Path) -> None:
    """Refuse a path that holds something else than a bundle, which replacing would destroy."""
    if target.is_dir() and not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise ExportError(f"{target} exists and is not an engine bundle; name another folder with --out")
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; name a folder with --out")


def _load(config: BuildConfig) -> EncoderSet:
    from geoengine.export.checkpoints import load_clip_encoders
    from geoengine.export.encoders import load_encoder_folder

    if config.encoder_folder is not None:
        return load_encoder_folder(config.encoder_folder, levels=config.levels)
    return load_clip_encoders(
        model=config.model,
        pretrained=config.pretrained,
        checkpoints=config.checkpoints,
        levels=config.levels or LEVELS,
    )


def _sides(config: BuildConfig, encoders: EncoderSet) -> tuple[int, ...]:
    usual = EARTH_SIDES if encoders.world == "earth" else ()
    wanted = usual if config.input_sizes is None else config.input_sizes
    return tuple(sorted({encoders.image_size, *wanted}))


def _check_space(folder: Path, encoders: EncoderSet) -> None:
    tensors = {t.data_ptr(): t.nbytes for tower in encoders.towers.values() for t in tower.parameters()}
    needed = sum(tensors.values()) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder} has {free / 1e6:.0f} MB free, and the bundle may need {needed / 1e6:.0f} MB: "
            "make room or name another folder with --out"
        )


def _write_graphs(
    staging: Path, encoders: EncoderSet, sides: tuple[int, ...], precision: str, steps: _Steps
) -> dict[str, Any]:
    """Write every ONNX file into `staging`; returns the manifest, without parity figures yet."""
    from geoengine.export.model import Head, Trunk
    from geoengine.export.onnx_graphs import write_heads, write_trunks

    first, blocks = next(iter(encoders.towers.values())), encoders.trunk_layers
    folder = staging / "onnx"
    folder.mkdir()
    steps("export the trunk")
    trunks = {
        side: Trunk(first, blocks=blocks, side=side, mean=encoders.mean, std=encoders.std) for side in sides
    }
    trunk_files = write_trunks(trunks, folder, precision=precision)
    del trunks
    steps("export the heads")
    heads = ((name, Head(tower, trunk_layers=blocks)) for name, tower in encoders.towers.items())
    head_files = write_heads(heads, folder, precision=precision)
    return {
        "schema": SCHEMA,
        "geoengine": importlib.metadata.version("geoengine"),
        "model": encoders.model,
        "pretrained": encoders.pretrained,
        "world": encoders.world,
        "levels": list(encoders.levels),
        "embed_dim": encoders.embed_dim,
        "image_size": encoders.image_size,
        "mean": list(encoders.mean),
        "std": list(encoders.std),
        "resize_mode": "shortest",
        "logit_scale": {name: encoders.logit_scale[name] for name in map(encoder_name, encoders.levels)},
        "graphs": {
            precision: {
                "trunks": {str(side): f"onnx/{file.name}" for side, file in trunk_files.items()},
                "heads": {name: f"onnx/{file.name}" for name, file in head_files.items()},
            }
        },
        "files": {f"onnx/{file.name}": _file_entry(file) for file in sorted(folder.iterdir())},
        "tools": {
            name: _version(name) for name in ("torch", "open_clip", "onnx", "onnxscript", "onnxruntime")
        },
        "parity": {},
    }


def _version(module: str) -> str:
    """Return the version of an installed module, whatever the package that brought it is called."""
    packages = importlib.metadata.packages_distributions()[module]
    return importlib.metadata.version(packages[0])


def _file_entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "bytes": file.stat().st_size}


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _measure(
    bundle: EngineBundle, encoders: EncoderSet | None, sides: tuple[int, ...], steps: _Steps
) -> list[Measurement]:
    """Run every encoder at every side through the bundle's CPU backend, against PyTorch where it is given."""
    from geoengine.export.parity import measure

    backend = open_backend(bundle, backend=ONNXRUNTIME_CPU)
    try:
        return [
            measure(backend, name, side, encoders, steps)
            for side in sides
            for name in bundle.manifest.graphs[Variant.fp32].heads
        ]
    finally:
        backend.close()


def _parity_table(results: Sequence[Measurement]) -> dict[str, dict[str, float | int]]:
    """Return the manifest's figures: cosines to PyTorch fp32 per encoder, over all sides."""
    table: dict[str, dict[str, float | int]] = {}
    for name in dict.fromkeys(result.encoder for result in results):
        cosines = [cosine for result in results if result.encoder == name for cosine in result.cosines]
        table[name] = {
            "min_cosine": round(min(cosines), 8),
            "mean_cosine": round(sum(cosines) / len(cosines), 8),
            "images": len(cosines),
        }
    return table


def _report(
    path: Path, manifest: Mapping[str, Any], results: Sequence[Measurement], start: float
) -> BuildReport:
    (precision, graphs), files = next(iter(manifest["graphs"].items())), manifest["files"]
    rows = []
    for side, file in graphs["trunks"].items():
        here = [result for result in results if result.side == int(side)]
        cosines = [cosine for result in here for cosine in result.cosines]
        rows.append(
            ReportRow(
                artifact=file,
                precision=precision,
                min_cosine=min(cosines) if cosines else None,
                mean_cosine=sum(cosines) / len(cosines) if cosines else None,
                images_per_second=next(r.images_per_second for r in here if r.encoder == PHOTO),
                bytes=files[file]["bytes"],
            )
        )
    speeds = {r.encoder: r.images_per_second for r in results if r.side == manifest["image_size"]}
    for name, file in graphs["heads"].items():
        figures = manifest["parity"].get(precision, {}).get(name, {})
        rows.append(
            ReportRow(
                artifact=file,
                precision=precision,
                min_cosine=figures.get("min_cosine"),
                mean_cosine=figures.get("mean_cosine"),
                images_per_second=speeds[name],
                bytes=files[file]["bytes"],
            )
        )
    named = {row.artifact for row in rows}
    rows += [
        ReportRow(artifact=file, precision=precision, bytes=entry["bytes"])
        for file, entry in files.items()
        if file not in named
    ]
    return BuildReport(
        path=path,
        model=manifest["model"],
        pretrained=manifest["pretrained"],
        world=manifest["world"],
        rows=tuple(rows),
        bytes=sum(entry["bytes"] for entry in files.values()) + (path / MANIFEST).stat().st_size,
        seconds=time.perf_counter() - start,
    )
