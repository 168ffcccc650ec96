"""What a build of an engine bundle is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from geoengine.engine.backends import BACKENDS, ONNXRUNTIME_CUDA, OPENVINO, TENSORRT
from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.tensorrt import DEFAULT_BATCH, MAX_BATCH, MIN_BATCH

PRECISIONS: Mapping[str, tuple[Variant, ...]] = {
    "fp32": (Variant.fp32,),
    "fp16": (Variant.fp16, Variant.fp16_attention),
    "int8": (Variant.int8,),
}
"""The variants that a build makes for a precision."""

EARTH_SIDES = (256, 512)
"""Sides in pixels of the usual map tiles, besides the encoders' own."""


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
