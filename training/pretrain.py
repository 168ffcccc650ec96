"""A stand-in for CLIP's pretraining: one small ViT learns to caption photos and tiles of the planet.

CLIP learned from captions to put a picture's content into its embedding. The planet has no texts, but its
laws are known: the caption of a picture is the code of the hues it shows (`planet_data`), and the tower
regresses a fixed orthonormal projection of that code. The result is the photo encoder, and what every map
encoder is fine-tuned from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from geoengine.training.planet_data import CODE_SIZE, Float32Array, Pictures
from geoengine.training.towers import Tower

Log = Callable[[dict[str, float]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Schedule of the caption regression; batches hold as many photos as tiles.

    `compile` takes a C++ compiler and a minute, and pays from a few hundred steps on.
    """

    steps: int = 1600
    batch: int = 96
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 100
    log_every: int = 100
    compile: bool = True


def caption_projection(seed: int, width: int) -> torch.Tensor:
    """Return a fixed matrix with orthonormal rows, float32[CODE_SIZE, width]."""
    generator = torch.Generator().manual_seed(seed)
    square: torch.Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return square[:CODE_SIZE].contiguous()


def normalise(pixels: np.ndarray, mean: Float32Array, std: Float32Array) -> torch.Tensor:
    """Turn uint8[n, S, S, 3] into the float32[n, 3, S, S] that an open_clip tower takes."""
    scaled = (torch.from_numpy(pixels).float() / 255 - torch.from_numpy(mean)) / torch.from_numpy(std)
    return scaled.permute(0, 3, 1, 2).contiguous()


def pretrain(
    tower: Tower,
    photos: Pictures,
    tiles: Pictures,
    projection: torch.Tensor,
    pixel_stats: tuple[Float32Array, Float32Array],
    config: PretrainConfig,
    log: Log,
) -> None:
    """Train `tower` in place to map photos and tiles to their projected captions.

    `projection` is float32[CODE_SIZE, output_dim], `pixel_stats` the mean and std per channel. `log` gets the
    mean squared error, as a share of the target's energy, of photos and tiles since the last entry.
    """
    optimizer = torch.optim.AdamW(
        tower.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    forward = torch.compile(tower) if config.compile else tower
    rng = np.random.default_rng(0)
    half = config.batch // 2
    started, sums, count = time.perf_counter(), torch.zeros(2), 0
    for step in range(config.steps):
        rows = [rng.integers(0, len(kind.pixels), half) for kind in (photos, tiles)]
        pixels = np.concatenate([kind.pixels[row] for kind, row in zip((photos, tiles), rows, strict=True)])
        captions = np.concatenate(
            [kind.captions[row] for kind, row in zip((photos, tiles), rows, strict=True)]
        )
        target = torch.from_numpy(captions) @ projection
        error = (forward(normalise(pixels, *pixel_stats)) - target).square().sum(1)
        loss = error.mean() / target.square().sum(1).mean()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        energy = target.square().sum(1)
        with torch.no_grad():
            sums += torch.stack(
                [error[:half].sum() / energy[:half].sum(), error[half:].sum() / energy[half:].sum()]
            )
        count += 1
        if (step + 1) % config.log_every == 0:
            photo_error, tile_error = (sums / count).tolist()
            elapsed = time.perf_counter() - started
            log(
                {
                    "step": step + 1,
                    "photo_error": photo_error,
                    "tile_error": tile_error,
                    "seconds": elapsed,
                }
            )
            sums, count = torch.zeros(2), 0


def _schedule(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / (config.steps - config.warmup)))
