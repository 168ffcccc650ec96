"""The two halves of an open_clip vision tower: the trunk that stays frozen, and the head that is trained."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

Tower: TypeAlias = Any
"""open_clip's `VisionTransformer`, which publishes no types."""


def trunk_tokens(tower: Tower, images: torch.Tensor, trunk_layers: int) -> torch.Tensor:
    """Run the stem and the first blocks: float[n, 3, S, S], normalised, to tokens float[n, T, width]."""
    tokens: torch.Tensor = tower._embeds(images)
    for block in tower.transformer.resblocks[:trunk_layers]:
        tokens = block(tokens)
    return tokens


def head_features(tower: Tower, tokens: torch.Tensor, trunk_layers: int) -> torch.Tensor:
    """Run the remaining blocks and `ln_post`: tokens float[n, T, width] to class features float[n, width]."""
    for block in tower.transformer.resblocks[trunk_layers:]:
        tokens = block(tokens)
    features: torch.Tensor = tower._pool(tokens)[0]
    return features


def freeze_trunk(tower: Tower, trunk_layers: int) -> list[nn.Parameter]:
    """Leave only the last blocks, `ln_post` and `proj` trainable, as in the paper; return those."""
    tower.requires_grad_(False)
    trained: list[nn.Module] = [*tower.transformer.resblocks[trunk_layers:], tower.ln_post]
    for module in trained:
        module.requires_grad_(True)
    tower.proj.requires_grad_(True)
    return [parameter for parameter in tower.parameters() if parameter.requires_grad]
