"""The parts of an image encoder, by what they do, whichever library's class holds them.

Known are open_clip's `VisionTransformer` and timm's within open_clip's `TimmModel` (SigLIP's towers among
them), in the forms that `tower_parts` does not refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from geoengine.engine.errors import ExportError

Tower: TypeAlias = Any  # open_clip and timm are untyped


class Activation(StrEnum):
    """The non-linearity of the feed-forward part."""

    quick_gelu = "quick_gelu"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense layer: weight[outputs, inputs], bias[outputs]; `scale` multiplies the outputs."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A normalisation and two dense layers with a non-linearity between, added to what goes in."""

    norm: nn.LayerNorm
    up: Dense
    down: Dense
    activation: Activation


@dataclass(frozen=True, slots=True)
class BlockParts:
    """A transformer block; `qkv` has the outputs of queries, keys and values after one another."""

    heads: int
    norm: nn.LayerNorm
    qkv: Dense
    out: Dense
    feed_forward: FeedForward


@dataclass(frozen=True, slots=True)
class LatentPool:
    """Pooling by attention from one learned query[width], projected already; timm's `AttentionPoolLatent`."""

    heads: int
    query: Tensor
    kv: Dense
    out: Dense
    feed_forward: FeedForward


class Pool(StrEnum):
    """Pooling without weights: the class token, or the mean of all patches."""

    token = "token"
    mean = "mean"


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerParts:
    """A vision transformer.

    `patch` holds the patch embedding's weight[width, 3, patch size, patch size]. `prefix`[p, width] and
    `position`[patches, width] are what the tokens before the patches are, and what is added to the patches.
    `token_norm` is applied to all tokens, `pool_norm` to the pooled one. `first_pooled` is the first token
    that a pooling of several tokens sees. `perceptron` are dense layers after the projection, with ReLU
    between them.
    """

    image_size: int
    patch: Dense
    prefix: Tensor
    position: Tensor
    pre_norm: nn.LayerNorm | None
    blocks: tuple[BlockParts, ...]
    token_norm: nn.LayerNorm | None
    pool: Pool | LatentPool
    first_pooled: int
    pool_norm: nn.LayerNorm | None
    projection: Dense | None
    perceptron: tuple[Dense, ...] = ()

    @property
    def patch_size(self) -> int:
        """The side of a patch in pixels."""
        return int(self.patch.weight.shape[-1])

    @property
    def grid(self) -> int:
        """The number of patches along a side; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def width(self) -> int:
        """The length of a token."""
        return int(self.patch.weight.shape[0])

    @property
    def embed_dim(self) -> int:
        """The length of an embedding."""
        last = self.perceptron[-1] if self.perceptron else self.projection
        return self.width if last is None else int(last.weight.shape[0])


class TowerAndPerceptron(nn.Module):
    """A tower, and dense layers with ReLU between them on what it gives; as GeoCLIP's image encoder is."""

    def __init__(self, tower: nn.Module, perceptron: nn.Sequential) -> None:
        super().__init__()
        self.tower, self.perceptron = tower, perceptron
        self.image_size = tower.image_size

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the embeddings of prepared pictures, [n, d]."""
        embeddings: Tensor = self.perceptron(self.tower(pictures))
        return embeddings


def tower_parts(tower: Tower) -> TowerParts:
    """Take a tower apart, without copying weights; ExportError for a form that is not known here."""
    from open_clip.timm_model import TimmModel  # type: ignore[import-untyped]
    from open_clip.transformer import VisionTransformer  # type: ignore[import-untyped]

    if isinstance(tower, TowerAndPerceptron):
        layers = [module for module in tower.perceptron if isinstance(module, nn.Linear)]
        return replace(tower_parts(tower.tower), perceptron=tuple(map(_dense, layers)))
    if isinstance(tower, VisionTransformer):
        parts = _open_clip_parts(tower)
    elif isinstance(tower, TimmModel):
        parts = _timm_parts(tower)
    else:
        raise ExportError(
            f"image encoders of type {type(tower).__name__} cannot be exported, only vision transformers of "
            "open_clip and timm"
        )
    height, width = tower.image_size
    size, grid = parts.patch_size, parts.grid
    if height != width or parts.patch.weight.shape[2:] != (size, size) or len(parts.position) != grid**2:
        raise ExportError(
            f"an image encoder for {height}x{width} pixels with {len(parts.position)} patches of {size} "
            "cannot be exported: its input must be square"
        )
    return parts


def _open_clip_parts(tower: Tower) -> TowerParts:
    from open_clip.transformer import ResidualAttentionBlock

    _refuse(
        {
            "attentional pooling": tower.attn_pool is not None,
            f'pooling "{tower.pool_type}"': tower.pool_type not in ("tok", "avg"),
            "custom attention blocks": _any_other(tower.transformer.resblocks, ResidualAttentionBlock),
            "token outputs": tower.output_tokens,
        }
    )
    position = tower.positional_embedding.detach().double()
    projection = None if tower.proj is None else Dense(tower.proj.detach().T, None)
    after = tower.final_ln_after_pool
    return TowerParts(
        image_size=int(tower.image_size[0]),
        patch=Dense(tower.conv1.weight.detach(), None),
        prefix=tower.class_embedding.detach()[None] + position[:1],
        position=position[1:],
        pre_norm=_norm(tower.ln_pre),
        blocks=tuple(map(_open_clip_block, tower.transformer.resblocks)),
        token_norm=None if after else _norm(tower.ln_post),
        pool=Pool.token if tower.pool_type == "tok" else Pool.mean,
        first_pooled=1,
        pool_norm=_norm(tower.ln_post) if after else None,
        projection=projection,
    )


def _open_clip_block(block: Tower) -> BlockParts:
    attention, mlp = block.attn, block.mlp
    return BlockParts(
        heads=int(attention.num_heads),
        norm=_layer_norm(block.ln_1),
        qkv=Dense(attention.in_proj_weight.detach(), attention.in_proj_bias.detach()),
        out=_dense(attention.out_proj, block.ls_1),
        feed_forward=FeedForward(
            _layer_norm(block.ln_2), _dense(mlp.c_fc), _dense(mlp.c_proj, block.ls_2), activation_of(mlp.gelu)
        ),
    )


def _timm_parts(tower: Tower) -> TowerParts:
    from timm.layers import AttentionPoolLatent, Mlp  # type: ignore[attr-defined]
    from timm.models.vision_transformer import Attention, Block, VisionTransformer  # type: ignore[attr-defined]

    trunk = tower.trunk
    if type(trunk) is not VisionTransformer:
        raise ExportError(
            f"image encoders of type {type(trunk).__name__} (timm) cannot be exported, only its "
            "VisionTransformer"
        )
    blocks, pool = trunk.blocks, trunk.attn_pool
    head = [module for module in tower.head if not isinstance(module, nn.Dropout)]
    _refuse(
        {
            "custom blocks": _any_other(blocks, Block)
            or _any_other((block.attn for block in blocks), Attention)
            or any(_is_custom(block.attn, "q_norm", "k_norm", "norm", "gate") for block in blocks)
            or _any_other((block.mlp for block in blocks), Mlp)
            or any(_is_custom(block.mlp, "norm") for block in blocks),
            f'pooling "{trunk.global_pool}"': trunk.global_pool not in ("token", "avg", "map")
            or (pool is not None and (type(pool) is not AttentionPoolLatent or pool.latent_len != 1)),
            "custom pooling": pool is not None
            and (_is_custom(pool, "q_norm", "k_norm", "pos_embed") or pool.mlp is None),
            "a patch embedding of several layers": not isinstance(trunk.patch_embed.proj, nn.Conv2d)
            or _is_custom(trunk.patch_embed, "norm"),
            "no position embedding": trunk.pos_embed is None,
            "a projection of several layers": len(head) > 1 or _is_custom(tower.head, "mlp", "pool"),
        }
    )
    projections = [module for module in (trunk.head, *head) if isinstance(module, nn.Linear)]
    prefix, position = _timm_positions(trunk)
    kinds = {"token": Pool.token, "avg": Pool.mean}
    return TowerParts(
        image_size=int(tower.image_size[0]),
        patch=_dense(trunk.patch_embed.proj),
        prefix=prefix,
        position=position,
        pre_norm=_norm(trunk.norm_pre),
        blocks=tuple(map(_timm_block, blocks)),
        token_norm=_norm(trunk.norm),
        pool=kinds[trunk.global_pool] if pool is None else _latent_pool(pool),
        first_pooled=0 if trunk.pool_include_prefix else len(prefix),
        pool_norm=_norm(trunk.fc_norm),
        projection=_dense(projections[0]) if projections else None,
    )


def _timm_positions(trunk: Tower) -> tuple[Tensor, Tensor]:
    """Return the tokens before the patches, and what is added to the patches, float64 both."""
    tokens = [token[0].detach() for token in (trunk.cls_token, trunk.reg_token) if token is not None]
    position = trunk.pos_embed[0].detach().double()
    prefix = torch.cat(tokens).double() if tokens else position[:0]
    if trunk.no_embed_class:
        return prefix, position
    return prefix + position[: len(prefix)], position[len(prefix) :]


def _timm_block(block: Tower) -> BlockParts:
    return BlockParts(
        heads=int(block.attn.num_heads),
        norm=_layer_norm(block.norm1),
        qkv=_dense(block.attn.qkv),
        out=_dense(block.attn.proj, block.ls1),
        feed_forward=_timm_feed_forward(block.norm2, block.mlp, block.ls2),
    )


def _timm_feed_forward(norm: Tower, mlp: Tower, scale: Tower = None) -> FeedForward:
    return FeedForward(_layer_norm(norm), _dense(mlp.fc1), _dense(mlp.fc2, scale), activation_of(mlp.act))


def _latent_pool(pool: Tower) -> LatentPool:
    with torch.no_grad():
        query = pool.latent[0, 0].double()
        if isinstance(pool.q, nn.Linear):
            query = query @ pool.q.weight.double().T + (0.0 if pool.q.bias is None else pool.q.bias.double())
    return LatentPool(
        heads=int(pool.num_heads),
        query=query,
        kv=_dense(pool.kv),
        out=_dense(pool.proj),
        feed_forward=_timm_feed_forward(pool.norm, pool.mlp),
    )


def activation_of(module: nn.Module) -> Activation:
    """Return which non-linearity a module is; ExportError for one that is not known here."""
    name = type(module).__name__  # open_clip and timm have classes of their own for each
    if name == "GELU":
        return Activation.gelu_tanh if getattr(module, "approximate", "none") == "tanh" else Activation.gelu
    known = {"QuickGELU": Activation.quick_gelu, "GELUTanh": Activation.gelu_tanh}
    if name not in known:
        raise ExportError(
            f"encoders with the activation {module} cannot be exported, only QuickGELU and GELU"
        )
    return known[name]


def _dense(module: Tower, scale: Tower = None) -> Dense:
    gamma = getattr(scale, "gamma", None)  # of a layer scale; other modules stand for none
    return Dense(
        module.weight.detach(),
        None if module.bias is None else module.bias.detach(),
        None if gamma is None else gamma.detach(),
    )


def _norm(module: nn.Module) -> nn.LayerNorm | None:
    return None if isinstance(module, nn.Identity) else _layer_norm(module)


def _layer_norm(module: nn.Module) -> nn.LayerNorm:
    if not isinstance(module, nn.LayerNorm) or module.weight is None or module.bias is None:
        raise ExportError(
            f"encoders with the normalisation {module} cannot be exported, "
            "only LayerNorm with weight and bias"
        )
    return module


def _any_other(modules: Any, kind: type) -> bool:  # noqa: ANN401  # modules of untyped libraries
    return any(type(module) is not kind for module in modules)


def _is_custom(module: Tower, *names: str) -> bool:
    """Tell whether one of a module's optional parts is there."""
    optional = (getattr(module, name, None) for name in names)
    return any(part is not None and not isinstance(part, nn.Identity) for part in optional)


def _refuse(reasons: Mapping[str, bool]) -> None:
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ExportError(f"an image encoder with {' and '.join(found)} cannot be exported")
