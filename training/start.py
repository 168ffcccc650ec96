"""The model that training starts from, and the files that `build-engines` takes when it is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from geoengine.engine.manifest import PHOTO
from geoengine.export.checkpoints import load_clip_encoders
from geoengine.export.encoders import (
    EncoderSet,
    folder_vision,
    load_encoder_folder,
    save_encoder_folder,
    state_digest,
)
from geoengine.training.errors import TrainingError
from geoengine.training.towers import Tower, check_tower

TRAINED_LAYERS = 2
"""Blocks of a map encoder that are trained (3.2)."""

CLIP_INITIAL_SCALE = 1 / 0.07
"""The inverse temperature that CLIP's own training began with, for models that have learned none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Start:
    """The photo encoder, which every map encoder is fine-tuned from, and the temperature that came with it.

    `folder` is the folder of encoders that it was read from, None for a model of open_clip.
    """

    tower: Tower
    encoders: EncoderSet
    scale: float
    folder: Path | None

    @property
    def trunk_layers(self) -> int:
        """The number of blocks that stay as they are."""
        return len(self.tower.transformer.resblocks) - TRAINED_LAYERS

    @property
    def digest(self) -> str:
        """The SHA-256, in hex, of the weights."""
        return state_digest(self.tower.state_dict())


def start_from_clip(model: str, pretrained: str) -> Start:
    """Start from a model of open_clip; `pretrained` is a tag, a file, or "none" for random weights."""
    encoders = load_clip_encoders(model=model, pretrained=pretrained, levels=(16,))
    return _start(encoders, encoders.logit_scale["z16"], None)


def start_from_folder(folder: Path) -> Start:
    """Start from the photo encoder of a folder of encoders; its map encoders play no part."""
    return _start(load_encoder_folder(folder), CLIP_INITIAL_SCALE, folder)


def _start(encoders: EncoderSet, scale: float, folder: Path | None) -> Start:
    tower: Tower = encoders.towers[PHOTO]
    check_tower(tower)
    if len(tower.transformer.resblocks) <= TRAINED_LAYERS:
        raise TrainingError(
            f"a model needs more than {TRAINED_LAYERS} blocks, of which the last {TRAINED_LAYERS} are trained"
        )
    return Start(tower=tower, encoders=encoders, scale=scale, folder=folder)


def write_encoders(
    out: Path, start: Start, heads: Mapping[str, Mapping[str, torch.Tensor]], scales: Mapping[str, float]
) -> None:
    """Write map encoders trained from a folder of encoders as such a folder, for `build-engines --encoders`.

    `heads` has the trained weights of each map encoder under the tower's names, `scales` its logit scale.
    """
    assert start.folder is not None
    trunk = start.tower.state_dict()
    save_encoder_folder(
        out,
        vision=folder_vision(start.folder),
        trunk=trunk,
        heads={PHOTO: trunk, **heads},
        trunk_layers=start.trunk_layers,
        mean=start.encoders.mean,
        std=start.encoders.std,
        logit_scale=scales,
        model=start.encoders.model,
        world=start.encoders.world,
    )


def log_scale_of(scale: float) -> torch.Tensor:
    """Return a logit scale as CLIP's checkpoints hold it: its logarithm, float32[]."""
    return torch.tensor(math.log(scale))
