"""Contrastive fine-tuning of one map encoder against frozen photo embeddings (the paper's section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from geoengine.training.towers import Tower, freeze_trunk, head_features

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuneConfig:
    """Schedule of one map encoder's fine-tuning; `ridge` weighs the start of the projection."""

    steps: int = 60
    learning_rate: float = 5e-4
    projection_learning_rate: float = 2e-3
    weight_decay: float = 0.02
    initial_scale: float = 12.0
    ridge: float = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class PairSet:
    """Photos and the tiles of one level that they were taken in.

    `photos` is float32[m, d], unit rows; `tokens` float[t, T, width], the trunk's output for each distinct
    tile; `tile_of` int64[m], the tile row of each photo.
    """

    photos: torch.Tensor
    tokens: torch.Tensor
    tile_of: torch.Tensor


@dataclass(frozen=True, slots=True)
class FineTuneResult:
    """Figures of a fine-tuning: mean loss of its first and last ten steps, and the learned logit scale."""

    first_loss: float
    last_loss: float
    logit_scale: float


def fit_projection(tower: Tower, pairs: PairSet, trunk_layers: int, ridge: float) -> None:
    """Set `tower.proj` to the ridge regression of class features onto the embeddings of the tiles' photos.

    A start in closed form: the contrastive steps then sharpen an encoder that already points the right way.
    """
    features = encode_in_batches(tower, pairs.tokens, trunk_layers)[pairs.tile_of]
    gram = features.T @ features
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram))
    with torch.no_grad():
        tower.proj.copy_(torch.linalg.solve(gram + penalty, features.T @ pairs.photos))


def encode_in_batches(tower: Tower, tokens: torch.Tensor, trunk_layers: int, size: int = 256) -> torch.Tensor:
    """Class features float32[t, width] of trunk tokens, before the projection, without gradients."""
    with torch.no_grad():
        return torch.cat(
            [head_features(tower, part.float(), trunk_layers) for part in torch.split(tokens, size)]
        )


def calibrate_scale(similarities: torch.Tensor, target: torch.Tensor) -> float:
    """Return the logit scale that makes the softmax of cosines most likely to be right (temperature scaling).

    `similarities` is float[m, c], one row of candidates per held-out photo, `target` int64[m] the true one's
    column. The negative log-likelihood is convex in the scale, so its minimum in [1, 1000] is bracketed.
    Source: Guo et al., On Calibration of Modern Neural Networks, 2017.
    """

    def loss(scale: float) -> float:
        return float(F.cross_entropy(scale * similarities, target))

    low, high = 1.0, 1000.0
    while high - low > 1e-3 * low:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return (low + high) / 2


def fine_tune(
    tower: Tower,
    pairs: PairSet,
    batches: Iterator[tuple[Int64Array, Int64Array]],
    trunk_layers: int,
    config: FineTuneConfig,
) -> FineTuneResult:
    """Train the head of `tower` in place so that each photo is most similar to its own tile.

    `batches` yields photo rows, and further tile rows that serve as negatives only. The loss is the softmax
    cross-entropy over cosine similarities times a learned scale, as in CLIP, from photo to tile; two photos
    in one tile are never each other's negatives.
    """
    projection = tower.proj
    parameters = [p for p in freeze_trunk(tower, trunk_layers) if p is not projection]
    log_scale = nn.Parameter(torch.tensor(math.log(config.initial_scale)))
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": [projection], "lr": config.projection_learning_rate, "weight_decay": 0.0},
            {"params": [log_scale], "lr": config.projection_learning_rate, "weight_decay": 0.0},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    losses = []
    for _ in range(config.steps):
        rows, extra = (torch.from_numpy(part) for part in next(batches))
        own = pairs.tile_of[rows]
        tiles, target = torch.unique(torch.cat([own, extra]), return_inverse=True)
        features = head_features(tower, pairs.tokens[tiles].float(), trunk_layers)
        embeddings = F.normalize(features @ projection, dim=1)
        logits = log_scale.exp().clamp(max=100) * (pairs.photos[rows] @ embeddings.T)
        loss = F.cross_entropy(logits, target[: len(rows)])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return FineTuneResult(
        float(np.mean(losses[:10])), float(np.mean(losses[-10:])), min(100.0, math.exp(log_scale.item()))
    )
