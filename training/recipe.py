"""How a map encoder is trained: the paper's recipe, ours, and everything that can be changed in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from geoengine.training.errors import TrainingError


class Schedule(StrEnum):
    """How the learning rate goes on: as it is, or down half a cosine after a short rise."""

    constant = "constant"
    cosine = "cosine"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The training of one map encoder; the defaults are the paper's (3.2 and 4.2).

    `batch` counts photos of one step over all processes, `accumulate` the parts that a step is computed in,
    to save memory: neither parts nor processes change the result. The projection and the temperature learn
    `projection_rate` times as fast as the rest. `scale`, the inverse temperature at the start, is by default
    the starting model's own.

    `siblings` and `neighbours` are negatives without a photo that each photo brings to its step: tiles with
    the same parent as its own, and tiles beside its own. Each photo draws them from `pool` tiles of either
    kind, chosen once, so that the pictures that training needs stay few. `smoothing` spreads the target of a
    photo over the tiles of the step by exp(-(distance - own distance) / tau), tau in sides of its own tile
    (0: the own tile alone). `ridge` weighs the start of the projection in closed form (0: the projection of
    the level before). `calibrate` fits the temperature on validation photos and their tiles' siblings when
    the level is done, instead of keeping the learned one.
    """

    epochs: int = 5
    batch: int = 64
    validation_batch: int = 128
    accumulate: int = 1
    learning_rate: float = 1e-4
    projection_rate: float = 1.0
    weight_decay: float = 0.0
    schedule: Schedule = Schedule.constant
    scale: float | None = None
    siblings: int = 0
    neighbours: int = 0
    pool: int = 4
    smoothing: float = 0.0
    ridge: float = 0.0
    calibrate: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "validation_batch", "accumulate", "pool"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("siblings", "neighbours", "smoothing", "ridge", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise TrainingError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "projection_rate"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be more than 0, got {getattr(self, name)}")
        if self.scale is not None and not 0 < self.scale <= MAX_SCALE:
            raise TrainingError(f"scale must be more than 0 and at most {MAX_SCALE:g}, got {self.scale}")
        if max(self.siblings, self.neighbours) > self.pool:
            raise TrainingError(
                f"a photo draws at most {self.pool} siblings and neighbours a step, its pool; "
                f"got {self.siblings} and {self.neighbours}"
            )
        if self.pool > MAX_POOL:
            raise TrainingError(f"pool must be at most {MAX_POOL}, the neighbours of a tile: {self.pool}")


MAX_SCALE = 100.0  # CLIP's own bound of the learned inverse temperature
MAX_POOL = 8

RECIPES: Mapping[str, Recipe] = {
    "paper": Recipe(),
    "geoengine": Recipe(ridge=1e-3, calibrate=True),
}
"""The recipes by name.

Ours has what was better in the ablation on the planet (`bench/training_ablation.py`), and nothing else.
"""
