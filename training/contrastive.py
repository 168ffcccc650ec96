"""The contrastive loss of the paper's section 3.2, and one step of training with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from geoengine.engine.tiles import EARTH_RADIUS_KM, centers, great_circle_km_array
from geoengine.training.negatives import Keys, tiles_of_keys
from geoengine.training.processes import Processes, autocast
from geoengine.training.recipe import MAX_SCALE
from geoengine.training.towers import Head

FloatArray = npt.NDArray[np.float64]


def contrastive_loss(
    photos: torch.Tensor, tiles: torch.Tensor, target: torch.Tensor, log_scale: torch.Tensor
) -> torch.Tensor:
    """Return the mean softmax cross-entropy over cosine similarities, from photo to tile.

    `photos` float[b, d] and `tiles` float[t, d] are unit rows; `target` is int64[b], the column of each
    photo's own tile, or float[b, t], a distribution over the tiles. The tiles are distinct, so two photos in
    one tile are not each other's negatives.
    """
    logits = log_scale.exp() * (photos @ tiles.T)
    return F.cross_entropy(logits, target)


def smoothed_target(
    zoom: int, places: tuple[FloatArray, FloatArray], tiles: Keys, target: npt.NDArray[np.int64], tau: float
) -> npt.NDArray[np.float32]:
    """Spread each photo's target over the tiles by distance, float32[b, t], rows that sum to one.

    `places` are the photos' longitudes and latitudes in degrees. The weight is exp(-(distance to the tile's
    centre - that of the own tile) / (tau * side of a tile at that latitude)), after the haversine smoothing
    of PIGEON (Haas et al., 2024, eq. 2), whose length in km is fixed since its cells are.
    """
    lng, lat = places
    middle = centers(zoom, tiles_of_keys(tiles))
    distance = great_circle_km_array(lng[:, None], lat[:, None], middle[None, :, 0], middle[None, :, 1])
    side = 2 * math.pi * EARTH_RADIUS_KM * np.cos(np.radians(lat)) / (1 << zoom)
    own = np.take_along_axis(distance, target[:, None], axis=1)
    weight = np.exp(-np.maximum(distance - own, 0) / (tau * side[:, None]))
    return np.asarray(weight / weight.sum(axis=1, keepdims=True), dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What a step works on: the photos' embeddings float32[b, d], the targets, and the number of tiles.

    `tokens` returns the tokens of some of the tiles, float16[n, T, width].
    """

    photos: torch.Tensor
    target: torch.Tensor
    tiles: int
    tokens: Callable[[slice], torch.Tensor]


def compute_gradients(
    head: Head, log_scale: nn.Parameter, batch: Batch, processes: Processes, accumulate: int, precision: str
) -> float:
    """Set the gradients of the loss of a batch, whole on every process, and return the loss.

    The loss needs all tiles at once, but the encoder does not: with `accumulate` parts, embeddings are
    computed without gradients first, the loss gives the gradient of each, and each part is then encoded
    again (Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021). The
    gradient is that of the whole batch whatever the number of parts and processes, but for rounding.
    """
    for parameter in (*head.parameters(), log_scale):
        parameter.grad = None
    share = processes.share(batch.tiles)
    ends = [share.start + (share.stop - share.start) * i // accumulate for i in range(accumulate + 1)]
    parts = [slice(a, b) for a, b in pairwise(ends) if a < b]
    at_once = len(parts) == 1

    def embed(part: slice) -> torch.Tensor:
        with autocast(processes.device, precision):
            embeddings: torch.Tensor = head(batch.tokens(part).float())
        return embeddings

    with torch.set_grad_enabled(at_once):
        embedded = [embed(part) for part in parts]
    own = torch.cat([part.detach() for part in embedded] or [batch.photos[:0]]).requires_grad_()
    loss = contrastive_loss(batch.photos, processes.gather(own, batch.tiles), batch.target, log_scale)
    torch.autograd.backward(loss)
    assert own.grad is not None
    for part, embeddings in zip(parts, embedded, strict=True):
        outputs = embeddings if at_once else embed(part)
        torch.autograd.backward(outputs, own.grad[part.start - share.start : part.stop - share.start])
    processes.sum_gradients(head.parameters())
    return float(loss.detach())


def bound_scale(log_scale: nn.Parameter) -> None:
    """Take a learned temperature back to CLIP's bound after a step.

    A bound in the loss would leave a temperature that is on it without a gradient: it would never come back.
    CLIP's own weights begin there.
    """
    log_scale.data.clamp_(max=math.log(MAX_SCALE))


def fit_projection(features: torch.Tensor, photos: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the ridge regression of class features float[m, w] onto photo embeddings float[m, d]: [w, d].

    A start of the projection in closed form: training then sharpens an encoder that already points the right
    way. `ridge` is in units of the features' mean square.
    """
    gram = features.T @ features
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    weights: torch.Tensor = torch.linalg.solve(gram + penalty, features.T @ photos)
    return weights


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
