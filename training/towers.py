"""The two halves of an open_clip vision tower: the trunk that stays frozen, and the head that is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from geoengine.training.errors import TrainingError

Tower: TypeAlias = Any
"""open_clip's `VisionTransformer`, which publishes no types."""


def check_tower(tower: Tower) -> None:
    """Raise TrainingError for a tower that is not a plain `VisionTransformer` with a class token."""
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", [None])
    plain = all(
        type(block).__name__ == "ResidualAttentionBlock" and not hasattr(block, "ln_1_kv") for block in blocks
    )
    if not plain or tower.pool_type != "tok" or tower.attn_pool is not None or tower.proj is None:
        raise TrainingError(
            f"only open_clip's plain vision transformers with a class token can be trained, and this "
            f"{type(tower).__name__} is not one: take a model such as ViT-B-32-quickgelu"
        )


def trunk_tokens(tower: Tower, images: torch.Tensor, trunk_layers: int) -> torch.Tensor:
    """Run the stem and the first blocks: float[n, 3, S, S], normalised, to tokens float[n, T, width]."""
    tokens: torch.Tensor = tower._embeds(images)
    for block in tower.transformer.resblocks[:trunk_layers]:
        tokens = block(tokens)
    return tokens


class Head(nn.Module):
    """A copy of what follows a tower's trunk: the last blocks, `ln_post` and `proj`; all of it is trained."""

    def __init__(self, tower: Tower, trunk_layers: int) -> None:
        super().__init__()
        self.trunk_layers = trunk_layers
        self.blocks: Any = copy.deepcopy(tower.transformer.resblocks[trunk_layers:])
        self.ln_post: Any = copy.deepcopy(tower.ln_post)
        self.proj = nn.Parameter(tower.proj.detach().clone())
        self.requires_grad_(True)

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Turn tokens float[n, T, width] into class features float[n, width].

        Only the class token is carried through the last block, since nothing else of it is used: features
        and gradients are those of the whole block.
        """
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        normal = last.ln_1(tokens)
        attended = last.attn(normal[:, :1], normal, normal, need_weights=False)[0]
        token = tokens[:, :1] + last.ls_1(attended)  # (n, 1, width)
        token = token + last.ls_2(last.mlp(last.ln_2(token)))
        features: torch.Tensor = self.ln_post(token[:, 0])
        return features

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Turn tokens float[n, T, width] into unit embeddings float32[n, d]."""
        return F.normalize((self.features(tokens) @ self.proj).float(), dim=1)

    def tower_state(self) -> dict[str, torch.Tensor]:
        """Return copies of the weights, on the CPU, under the tower's names."""
        return {
            self._tower_name(name): tensor.detach().to("cpu", torch.float32).clone().contiguous()
            for name, tensor in self.state_dict().items()
        }

    def load_tower_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the weights that `tower_state` returned; raises TrainingError for those of another model."""
        own = {self._tower_name(name): name for name in self.state_dict()}
        if own.keys() != state.keys() or any(
            state[name].shape != self.state_dict()[own[name]].shape for name in own
        ):
            raise TrainingError(
                "the checkpoint is of another model: its tensors or their shapes differ from the starting "
                "model's; name the model that it was trained from, or another folder with --out"
            )
        self.load_state_dict({own[name]: tensor for name, tensor in state.items()})

    def _tower_name(self, name: str) -> str:
        kind, _, rest = name.partition(".")
        if kind != "blocks":
            return name
        number, _, rest = rest.partition(".")
        return f"transformer.resblocks.{int(number) + self.trunk_layers}.{rest}"
