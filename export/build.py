"""Building engine bundles: load, export, check, and only then put in place."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoengine.engine.backends import BACKENDS, ONNXRUNTIME_CUDA, OPENVINO, TENSORRT, require_backend
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError, ExportError, GeoEngineError
from geoengine.engine.extras import require_extra
from geoengine.engine.manifest import MANIFEST, SCHEMA, Variant, encoder_name
from geoengine.engine.tiles import LEVELS
from geoengine.export.check import Progress, Steps, check_backends, compile_bundle, pairs_of
from geoengine.export.report import BuildReport, ReportRow, make_report, parity_table
from geoengine.export.staging import Staging, check_target, keep_plans, locked, staging_path
from geoengine.export.tensorrt import DEFAULT_BATCH, MAX_BATCH, MIN_BATCH

if TYPE_CHECKING:
    from geoengine.export.encoders import EncoderSet
    from geoengine.export.parity import Measurement

PRECISIONS: Mapping[str, tuple[Variant, ...]] = {
    "fp32": (Variant.fp32,),
    "fp16": (Variant.fp16, Variant.fp16_attention),
    "int8": (Variant.int8,),
}
"""The variants that a build makes for a precision."""

EARTH_SIDES = (256, 512)
"""Sides in pixels of the usual map tiles, besides the encoders' own."""

_NEEDED = ("torch", "open_clip", "onnx", "onnx_ir", "safetensors")
_FLOAT = "float"  # where fp32 graphs wait to be quantized, if the bundle is not to have them
_SPARE_BYTES = 10_000_000  # resize matrices, graphs, reference, manifest
_BYTES_PER_WEIGHT = {"fp32": 4, "fp16": 2, "int8": 5}  # int8 graphs are made from fp32 ones


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What to build.

    Either `model`, `pretrained` (a tag, a weights file, or "none" for random weights) and perhaps
    `checkpoints` (a folder of fine-tuned map encoders), or `encoder_folder` (one that `save_encoder_folder`
    wrote).
    `precisions` are keys of `PRECISIONS`; None stands for what `backend` computes in: fp16 and int8 for
    "auto", and fp32 for the planet's small encoders. `backend` other than "auto" must run here, or the build
    fails. `max_batch` is the largest batch of TensorRT's plans. `calibration` is a folder of pictures like
    those that will be searched, from which int8 takes its ranges; None takes pictures that the package makes.
    `input_sizes` are the sides in pixels of the pictures that the bundle takes without a resize before it;
    the encoders' own is always there. None stands for all levels of the encoders, and the usual tile sizes.
    """

    model: str = "ViT-B-32-quickgelu"
    pretrained: str = "openai"
    checkpoints: Path | None = None
    encoder_folder: Path | None = None
    precisions: tuple[str, ...] | None = None
    backend: str = "auto"
    max_batch: int = DEFAULT_BATCH
    calibration: Path | None = None
    input_sizes: tuple[int, ...] | None = None
    out: Path = Path("engines")
    levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.precisions or () if name not in PRECISIONS]
        if unknown or self.precisions == ():
            raise ExportError(
                f"unknown precision {', '.join(map(repr, unknown))}: there are {', '.join(PRECISIONS)}"
            )
        if self.backend not in ("auto", *BACKENDS):
            raise ExportError(f"unknown backend {self.backend!r}: there are auto, {', '.join(BACKENDS)}")
        if not MIN_BATCH <= self.max_batch <= MAX_BATCH:
            raise ExportError(
                f"the largest batch must be from {MIN_BATCH} to {MAX_BATCH}, got {self.max_batch}"
            )
        if self.calibration is not None and not self.calibration.is_dir():
            raise ExportError(f"the folder of pictures for calibration, {self.calibration}, does not exist")
        if self.checkpoints is not None and self.encoder_folder is not None:
            raise ExportError("give either a folder of checkpoints or a folder of encoders, not both")
        if any(not 1 <= side <= 4096 for side in self.input_sizes or ()):
            raise ExportError(
                f"input sizes must be from 1 to 4096 pixels, got {list(self.input_sizes or ())}"
            )
        levels = self.levels
        if levels is not None and (not levels or list(levels) != sorted(set(levels)) or levels[0] < 0):
            raise ExportError(f"levels must increase strictly from 0 or more, got {list(levels)}")

    def precisions_for(self, world: str) -> tuple[str, ...]:
        """Return the precisions to build for encoders of a world, without repetition, in a fixed order."""
        chosen = self.precisions
        if chosen is None:
            by_backend = {TENSORRT: ("fp16",), ONNXRUNTIME_CUDA: ("fp16",), OPENVINO: ("int8",)}
            usual = ("fp16", "int8") if world == "earth" else ("fp32",)
            chosen = by_backend.get(self.backend, usual)
        return tuple(name for name in PRECISIONS if name in chosen)


def build_engines(config: BuildConfig, progress: Progress | None = None) -> BuildReport:
    """Build the bundle `config.out` and return what was measured.

    Everything is written to a hidden folder beside `config.out`, held to the gates on every backend that runs
    here, and only then put in place; an existing bundle is replaced only then. A build that was interrupted
    is taken up again by the same call. With TensorRT and a GPU, the bundle is at last compiled for that GPU.
    Raises ExportError when the encoders cannot be loaded or exported, when the disk is too small, or when an
    encoder does not agree with PyTorch, BackendError when `config.backend` cannot run here; `config.out` is
    then as before. A KeyboardInterrupt says, if it says anything, which other command goes on.
    """
    require_extra("export", _NEEDED, "building engines")
    start = time.perf_counter()
    target = config.out.absolute()
    check_target(target)
    steps = Steps(progress)
    steps("load the encoders")
    encoders = _load(config)
    work = _Work(config, encoders, steps)
    if config.backend != "auto":
        require_backend(config.backend, work.variants)
    _check_space(target, encoders, work.precisions)
    with locked(target):
        staging = Staging(target, work.key())
        try:
            results, skipped = work.run(staging)
            keep_plans(target, staging.path)
            staging.finish()
        except GeoEngineError:
            staging.discard()
            raise
        except OSError as error:
            raise ExportError(
                f"{error}; what is done so far is kept in {staging.path}, "
                "and the same command goes on from there"
            ) from error
    steps("")
    compiled: tuple[ReportRow, ...] = ()
    if "fp16" in work.precisions and config.backend in ("auto", TENSORRT):
        try:
            compiled = compile_bundle(target, max_batch=config.max_batch, progress=progress).rows
        except (BackendError, ExportError) as error:
            if config.backend == TENSORRT:
                raise
            skipped[TENSORRT] = str(error)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"the bundle in {config.out} is whole, and only TensorRT's plans are missing: "
                f"`geoengine build-engines --plans --out {config.out}` goes on with them"
            ) from None
    bundle = EngineBundle.open(target, verify=False)
    report = make_report(bundle, results, skipped, time.perf_counter() - start)
    return replace(report, rows=report.rows + compiled)


class _Work:
    """One build: what is made of which encoders."""

    def __init__(self, config: BuildConfig, encoders: EncoderSet, steps: Steps) -> None:
        self._config, self._encoders, self._steps = config, encoders, steps
        self.precisions = config.precisions_for(encoders.world)
        self.variants = [variant for name in self.precisions for variant in PRECISIONS[name]]
        self._sides = _sides(config, encoders)
        self._weights = _weights_digest(encoders)

    def key(self) -> str:
        """Return what an interrupted build must have in common with this one to be taken up again."""
        pictures = sorted(self._config.calibration.rglob("*")) if self._config.calibration else []
        return json.dumps(
            {
                "weights": self._weights,
                "levels": self._encoders.levels,
                "variants": self.variants,
                "sides": self._sides,
                "calibration": [(str(file), file.stat().st_size) for file in pictures],
                "tools": _tools(),
                "geoengine": importlib.metadata.version("geoengine"),
            }
        )

    def run(self, staging: Staging) -> tuple[list[Measurement], dict[str, str]]:
        """Fill the staging folder with a whole bundle; returns the figures, and why backends cannot run."""
        from geoengine.export.reference import REFERENCE, load_reference, make_reference, save_reference

        folder = staging.path
        (folder / "onnx").mkdir(exist_ok=True)
        graphs = {variant: self._graphs(staging, variant) for variant in self.variants}
        shutil.rmtree(folder / _FLOAT, ignore_errors=True)
        manifest = self._manifest(folder, graphs)
        _write_manifest(folder, manifest)
        bundle = EngineBundle.open(folder, verify=False)
        pairs = pairs_of(bundle)
        self._steps.total = self._steps.done + len(pairs) * (1 + len(self.variants)) + 1

        def write_reference() -> None:
            save_reference(make_reference(self._encoders, pairs, self._steps), folder / REFERENCE)

        staging.noted("reference", write_reference)
        results, skipped = check_backends(
            bundle,
            load_reference(folder / REFERENCE),
            self._steps,
            backends=tuple(name for name in BACKENDS if name != TENSORRT),
            required=None if self._config.backend in ("auto", TENSORRT) else self._config.backend,
            noted=staging.noted,
        )
        manifest["files"][REFERENCE] = _file_entry(folder / REFERENCE)
        manifest["parity"] = parity_table(results)
        manifest["preferred"] = _preferred(results)
        _write_manifest(folder, manifest)
        return results, skipped

    def _graphs(self, staging: Staging, variant: Variant) -> dict[str, dict[str, str]]:
        """Write the graphs of one variant, unless they are there; returns the manifest's entry for them."""
        folder = staging.path / "onnx"
        if variant is not Variant.int8:
            return self._float_graphs(staging, folder, variant)
        source = folder
        if Variant.fp32 not in self.variants:
            source = staging.path / _FLOAT
            source.mkdir(exist_ok=True)

        def quantize() -> dict[str, dict[str, str]]:
            from geoengine.export.calibration import calibration_pictures
            from geoengine.export.int8 import quantize_graphs

            _remove(folder.glob(f"*.{variant}.onnx"))
            floats = self._float_graphs(staging, source, Variant.fp32)
            self._steps("calibrate and quantize to int8")
            trunks, heads = quantize_graphs(
                {int(side): staging.path / path for side, path in floats["trunks"].items()},
                {name: staging.path / path for name, path in floats["heads"].items()},
                folder,
                calibration_pictures(self._config.calibration, self._encoders.image_size),
            )
            return _graph_paths(staging.path, trunks, heads)

        found: dict[str, dict[str, str]] = staging.noted("int8", quantize)
        return found

    def _float_graphs(self, staging: Staging, folder: Path, variant: Variant) -> dict[str, dict[str, str]]:
        from geoengine.export.onnx_graphs import write_heads, write_trunks

        encoders = self._encoders

        def trunks() -> dict[str, str]:
            self._steps(f"export the trunk, {variant}")
            _remove(folder.glob(f"trunk.*.{variant}.onnx"))
            made = {side: encoders.trunk(side) for side in self._sides}
            files = write_trunks(made, folder, variant=variant)
            return _graph_paths(staging.path, files, {})["trunks"]

        def heads() -> dict[str, str]:
            self._steps(f"export the heads, {variant}")
            _remove(folder.glob(f"head_*.{variant}.onnx"))
            made = ((name, encoders.head(name)) for name in encoders.towers)
            files = write_heads(made, folder, variant=variant)
            return _graph_paths(staging.path, {}, files)["heads"]

        return {
            "trunks": staging.noted(f"trunks {variant}", trunks),
            "heads": staging.noted(f"heads {variant}", heads),
        }

    def _manifest(self, folder: Path, graphs: Mapping[Variant, Any]) -> dict[str, Any]:
        """Return the manifest, without parity figures yet."""
        encoders = self._encoders
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
            "resize_mode": encoders.resize_mode,
            "logit_scale": {name: encoders.logit_scale[name] for name in map(encoder_name, encoders.levels)},
            "graphs": graphs,
            "preferred": {},
            "weights": self._weights,
            "files": {f"onnx/{file.name}": _file_entry(file) for file in sorted((folder / "onnx").iterdir())},
            "tools": _tools(),
            "parity": {},
        }


def _remove(files: Iterable[Path]) -> None:
    """Remove what an interrupted build may have left half written."""
    for file in files:
        file.unlink()


def _graph_paths(
    root: Path, trunks: Mapping[int, Path], heads: Mapping[str, Path]
) -> dict[str, dict[str, str]]:
    return {
        "trunks": {str(side): file.relative_to(root).as_posix() for side, file in trunks.items()},
        "heads": {name: file.relative_to(root).as_posix() for name, file in heads.items()},
    }


def _preferred(results: Sequence[Measurement]) -> dict[str, str]:
    """Return which variant ONNX Runtime ran fastest on the GPU, by the backend's name; {} without one."""
    seconds: dict[str, float] = {}
    for result in results:
        if result.backend == ONNXRUNTIME_CUDA:
            seconds[result.variant] = seconds.get(result.variant, 0.0) + 1 / result.images_per_second
    return {ONNXRUNTIME_CUDA: min(seconds, key=seconds.__getitem__)} if seconds else {}


def _weights_digest(encoders: EncoderSet) -> str:
    """Return the SHA-256 of all encoders' weights; tensors that several share are read once."""
    digests: dict[int, str] = {}
    whole = hashlib.sha256()
    for encoder, tower in encoders.towers.items():
        for name, tensor in tower.state_dict().items():
            if tensor.data_ptr() not in digests:
                values = tensor.detach().float().contiguous().numpy()
                digests[tensor.data_ptr()] = hashlib.sha256(values.data).hexdigest()
            whole.update(f"{encoder} {name} {tuple(tensor.shape)} {digests[tensor.data_ptr()]}\n".encode())
    return whole.hexdigest()


def _tools() -> dict[str, str]:
    modules = ("torch", "open_clip", "onnx", "onnx_ir", "onnxruntime")
    return {name: str(import_module(name).__version__) for name in modules}


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


def _check_space(target: Path, encoders: EncoderSet, precisions: Sequence[str]) -> None:
    """Make the folder that the bundle will be in; raise ExportError when its disk has too little room."""
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"the folder {folder} cannot be made ({error.strerror}): name another one with --out"
        ) from error
    tensors = {t.data_ptr(): t.numel() for tower in encoders.towers.values() for t in tower.parameters()}
    needed = sum(tensors.values()) * sum(_BYTES_PER_WEIGHT[name] for name in precisions) + _SPARE_BYTES
    begun = sum(file.stat().st_size for file in staging_path(target).rglob("*") if file.is_file())
    needed = max(needed - begun, _SPARE_BYTES)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder} has {free / 1e6:.0f} MB free, and the bundle may need {needed / 1e6:.0f} MB: "
            "make room or name another folder with --out"
        )


def _file_entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "bytes": file.stat().st_size}


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
