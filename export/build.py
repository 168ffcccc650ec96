"""Building engine bundles: load, export, check, and only then put in place."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from geoengine.engine.backends import TENSORRT, require_backend
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError, ExportError, GeoEngineError
from geoengine.engine.extras import require_extra
from geoengine.engine.tiles import LEVELS
from geoengine.export.check import Progress, Steps, compile_bundle
from geoengine.export.config import BuildConfig
from geoengine.export.report import BuildReport, ReportRow, make_report
from geoengine.export.staging import Staging, check_target, keep_geoclip, keep_plans, locked, staging_path
from geoengine.export.work import Work

if TYPE_CHECKING:
    from geoengine.export.encoders import EncoderSet

NEEDED = ("torch", "open_clip", "onnx", "onnx_ir", "safetensors")
"""The modules of the extra "export"."""

_BYTES_PER_WEIGHT = {"fp32": 4, "fp16": 2, "int8": 5}  # int8 graphs are made from fp32 ones


def build_engines(config: BuildConfig, progress: Progress | None = None) -> BuildReport:
    """Build the bundle `config.out` and return what was measured.

    Everything is written to a hidden folder beside `config.out`, held to the gates on every backend that runs
    here, and only then put in place; an existing bundle is replaced only then, and GeoCLIP in it is kept. A
    build that was interrupted is taken up again by the same call. With TensorRT and a GPU, the bundle is at
    last compiled for that GPU.
    Raises ExportError when the encoders cannot be loaded or exported, when the disk is too small, or when an
    encoder does not agree with PyTorch, BackendError when `config.backend` cannot run here; `config.out` is
    then as before. A KeyboardInterrupt says, if it says anything, which other command goes on.
    """
    require_extra("export", NEEDED, "building engines")
    target = config.out.absolute()
    check_target(target)
    steps = Steps(progress)
    steps("load the encoders")
    return build_bundle(config, target, Work(config, _load(config), steps), steps, progress)


def build_bundle(
    config: BuildConfig, target: Path, work: Work, steps: Steps, progress: Progress | None
) -> BuildReport:
    """Do a build's work and put the bundle in the folder `target`; see `build_engines`."""
    start = time.perf_counter()
    if config.backend != "auto":
        require_backend(config.backend, work.variants)
    _check_space(target, work)
    with locked(target):
        staging = Staging(target, work.key())
        try:
            results, skipped = work.run(staging)
            keep_plans(target, staging.path)
            keep_geoclip(target, staging.path)
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
    report = make_report(bundle, results, skipped, time.perf_counter() - start, work.figures)
    return replace(report, rows=report.rows + compiled)


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


def _check_space(target: Path, work: Work) -> None:
    """Make the folder that the bundle will be in; raise ExportError when its disk has too little room."""
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"the folder {folder} cannot be made ({error.strerror}): name another one with --out"
        ) from error
    tensors = {t.data_ptr(): t.numel() for tower in work.encoders.towers.values() for t in tower.parameters()}
    per_weight = sum(_BYTES_PER_WEIGHT[name] for name in work.precisions)
    needed = sum(tensors.values()) * per_weight + work.extra_bytes
    begun = sum(file.stat().st_size for file in staging_path(target).rglob("*") if file.is_file())
    needed = max(needed - begun, work.extra_bytes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder} has {free / 1e6:.0f} MB free, and the bundle may need {needed / 1e6:.0f} MB: "
            "make room or name another folder with --out"
        )
