"""The encoders as explicit modules, spelled out for export: a trunk that all share and a head for each.

The weights come from open_clip's `VisionTransformer`, and so do the numbers. What differs is the form: stable
weight names, attention as two plain matrix products with its scale folded into the query weights, and only
the class token carried through the last block. Preprocessing is inside.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from geoengine.engine.errors import ExportError
from geoengine.export.resample import resize_matrix

OpenClip: TypeAlias = Any  # open_clip's modules are untyped


class Activation(StrEnum):
    """The non-linearity of the feed-forward part."""

    quick_gelu = "quick_gelu"
    gelu = "gelu"

    def apply(self, x: Tensor) -> Tensor:
        """Apply it element by element."""
        return x * torch.sigmoid(1.702 * x) if self is Activation.quick_gelu else functional.gelu(x)


class Weights(nn.Module):
    """A module of frozen float32 parameters, some of which are a source weight times a constant.

    `folded` maps such a parameter's name to the source weight and the constant, float32 both, so that the
    source can be stored where it has a shorter exact form: parameter == source * constant, bit for bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folded: dict[str, tuple[Tensor, Tensor]] = {}

    def put(self, name: str, value: Tensor, scale: Tensor | None = None) -> None:
        """Register `value`, times `scale` where given, as the parameter `name`."""
        value = value.detach().float().contiguous()
        if scale is not None:
            self.folded[name] = (value, scale)
            value = value * scale
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def put_norm(self, name: str, norm: nn.LayerNorm) -> None:
        """Register a layer normalisation's two parameters as `<name>_weight` and `<name>_bias`."""
        self.put(f"{name}_weight", norm.weight)
        self.put(f"{name}_bias", norm.bias)
        setattr(self, f"{name}_eps", norm.eps)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Apply the layer normalisation `name` over the last axis."""
        weight, bias = self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")
        return functional.layer_norm(x, weight.shape, weight, bias, getattr(self, f"{name}_eps"))


class Block(Weights):
    """A block of open_clip's `ResidualAttentionBlock`: float32[n, tokens, width] in and out."""

    w_qkv: Tensor
    b_qkv: Tensor
    w_out: Tensor
    b_out: Tensor
    w_up: Tensor
    b_up: Tensor
    w_down: Tensor
    b_down: Tensor

    def __init__(self, source: OpenClip) -> None:
        super().__init__()
        attention = source.attn
        self.heads = int(attention.num_heads)
        self.width = int(attention.embed_dim)
        self.activation = activation_of(source.mlp.gelu)
        self.put_norm("ln_1", source.ln_1)
        self.put_attention(attention.in_proj_weight, attention.in_proj_bias)
        self.put_norm("ln_2", source.ln_2)
        after_attention, after_mlp = _layer_scale(source.ls_1), _layer_scale(source.ls_2)
        self.put("w_out", attention.out_proj.weight.T, after_attention)
        self.put("b_out", attention.out_proj.bias, after_attention)
        self.put("w_up", source.mlp.c_fc.weight.T)
        self.put("b_up", source.mlp.c_fc.bias)
        self.put("w_down", source.mlp.c_proj.weight.T, after_mlp)
        self.put("b_down", source.mlp.c_proj.bias, after_mlp)

    def put_attention(self, weight: Tensor, bias: Tensor) -> None:
        """Register the query, key and value projections, float32[3 * width, width], as one matrix."""
        scale = torch.ones(3 * self.width)
        scale[: self.width] = (self.width // self.heads) ** -0.5
        self.put("w_qkv", weight.T, scale)
        self.put("b_qkv", bias, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Run attention over all tokens, then the feed-forward part."""
        tokens = x.shape[1]
        qkv = self.norm("ln_1", x) @ self.w_qkv + self.b_qkv
        qkv = qkv.reshape(-1, tokens, 3, self.heads, self.width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = (qkv[0] @ qkv[1].transpose(-2, -1)).softmax(-1) @ qkv[2]  # (n, heads, tokens, width / heads)
        return self.finish(x, mixed.transpose(1, 2).reshape(-1, tokens, self.width))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the attention's result, then the feed-forward part, to the residual stream `x`."""
        x = x + (mixed @ self.w_out + self.b_out)
        hidden = self.activation.apply(self.norm("ln_2", x) @ self.w_up + self.b_up)
        return x + (hidden @ self.w_down + self.b_down)


class ClassBlock(Block):
    """A last block: of its result only the class token is computed, float32[n, 1, width]."""

    w_q: Tensor
    b_q: Tensor
    w_kv: Tensor
    b_kv: Tensor

    def put_attention(self, weight: Tensor, bias: Tensor) -> None:
        """Register the query projection apart from that of keys and values."""
        scale = torch.full((self.width,), (self.width // self.heads) ** -0.5)
        self.put("w_q", weight[: self.width].T, scale)
        self.put("b_q", bias[: self.width], scale)
        self.put("w_kv", weight[self.width :].T)
        self.put("b_kv", bias[self.width :])

    def forward(self, x: Tensor) -> Tensor:
        """Run attention from the class token to all tokens, then the feed-forward part for it alone."""
        tokens, depth = x.shape[1], self.width // self.heads
        normal = self.norm("ln_1", x)
        q = (normal[:, :1] @ self.w_q + self.b_q).reshape(-1, 1, self.heads, depth).permute(0, 2, 1, 3)
        kv = (normal @ self.w_kv + self.b_kv).reshape(-1, tokens, 2, self.heads, depth).permute(2, 0, 3, 1, 4)
        mixed = (q @ kv[0].transpose(-2, -1)).softmax(-1) @ kv[1]  # (n, heads, 1, width / heads)
        return self.finish(x[:, :1], mixed.transpose(1, 2).reshape(-1, 1, self.width))


class Trunk(Weights):
    """Pictures to tokens: uint8[n, side, side, 3] RGB -> float32[n, tokens, width], class token first.

    `tower` is an open_clip vision tower and `blocks` the number of its blocks that the trunk includes. `side`
    is in pixels; pictures are resized as Pillow does, unless it is the tower's own. `mean` and `std` are per
    channel of pixels in 0 to 1. Raises ExportError for a tower of a form that is not known here.
    """

    resize_rows: Tensor
    resize_columns: Tensor
    w_patch: Tensor
    class_token: Tensor
    position: Tensor

    def __init__(
        self,
        tower: OpenClip,
        *,
        blocks: int,
        side: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        check_tower(tower)
        self.image_size = int(tower.image_size[0])
        self.patch = int(tower.patch_size[0])
        self.resizes = side != self.image_size
        if self.resizes:
            matrix = torch.from_numpy(resize_matrix(side, self.image_size))
            self.put("resize_rows", matrix)
            self.put("resize_columns", matrix.T)
        kernel = tower.conv1.weight.detach().float()  # (width, 3, patch, patch)
        per_input = torch.tensor(std).repeat_interleave(self.patch**2).mul(255).reciprocal()
        self.put("w_patch", kernel.flatten(1).T, per_input[:, None])
        offset = torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        bias = -(kernel.double() * offset[:, None, None]).sum((1, 2, 3))
        position = tower.positional_embedding.detach().double()
        self.put("class_token", (tower.class_embedding.detach().double() + position[0])[None, None])
        self.put("position", position[1:] + bias)
        self.normalises = isinstance(tower.ln_pre, nn.LayerNorm)
        if self.normalises:
            self.put_norm("ln_pre", tower.ln_pre)
        self.blocks = nn.ModuleList(map(Block, tower.transformer.resblocks[:blocks]))

    def resize(self, pixels: Tensor) -> Tensor:
        """Return uint8[n, side, side, 3] as float32[n, 3, image size, image size], whole numbers 0 to 255.

        Pillow filters along rows first, and rounds to 8 bits after either direction.
        """
        x = pixels.permute(0, 3, 1, 2).float()
        if not self.resizes:
            return x
        x = torch.floor(x @ self.resize_columns + 0.5).clamp(0.0, 255.0)
        return torch.floor(self.resize_rows @ x + 0.5).clamp(0.0, 255.0)

    def forward(self, pixels: Tensor) -> Tensor:
        """Resize, embed the patches, and run the trunk's blocks."""
        grid, patch = self.image_size // self.patch, self.patch
        x = self.resize(pixels).reshape(-1, 3, grid, patch, grid, patch)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, grid * grid, 3 * patch * patch)
        x = x @ self.w_patch + self.position
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)  # (n, tokens, width)
        if self.normalises:
            x = self.norm("ln_pre", x)
        for block in self.blocks:
            x = block(x)
        return x


class Head(Weights):
    """Tokens to a unit-length embedding: float32[n, tokens, width] -> float32[n, d].

    `tower` is an open_clip vision tower, of which the trunk has the first `trunk_layers` blocks; at least one
    must be left. Raises ExportError for a tower of a form that is not known here.
    """

    projection: Tensor

    def __init__(self, tower: OpenClip, *, trunk_layers: int) -> None:
        super().__init__()
        check_tower(tower)
        self.tokens, self.width = tower.positional_embedding.shape
        *blocks, last = tower.transformer.resblocks[trunk_layers:]
        self.blocks = nn.ModuleList([*map(Block, blocks), ClassBlock(last)])
        self.put_norm("ln_post", tower.ln_post)
        self.put("projection", tower.proj)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the remaining blocks and project the class token."""
        for block in self.blocks:
            tokens = block(tokens)
        x = self.norm("ln_post", tokens[:, 0]) @ self.projection
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / length.clamp_min(1e-12)


def folded_weights(module: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the `folded` weights of a trunk or head and of its blocks, by full parameter name."""
    found = dict(module.folded)
    for prefix, child in module.named_modules():
        if prefix and isinstance(child, Weights):
            found.update({f"{prefix}.{name}": parts for name, parts in child.folded.items()})
    return found


def activation_of(module: nn.Module) -> Activation:
    """Return which non-linearity an open_clip module is; ExportError for one that is not known here."""
    from open_clip.transformer import QuickGELU  # type: ignore[import-untyped]

    if isinstance(module, QuickGELU):
        return Activation.quick_gelu
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return Activation.gelu
    raise ExportError(
        f"encoders with the activation {module} cannot be exported, only QuickGELU and exact GELU"
    )


def check_tower(tower: OpenClip) -> None:
    """Raise ExportError, which says why, for an image encoder whose form this module does not spell out."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if not isinstance(tower, VisionTransformer):
        raise ExportError(
            f"image encoders of type {type(tower).__name__} cannot be exported, "
            "only open_clip's VisionTransformer"
        )
    height, width = tower.image_size
    refused = {
        "attentional pooling": tower.attn_pool is not None,
        f'pooling "{tower.pool_type}" (only the class token, "tok")': tower.pool_type != "tok",
        "custom attention blocks": any(
            type(block) is not ResidualAttentionBlock for block in tower.transformer.resblocks
        ),
        "token outputs": tower.output_tokens,
        "no projection": tower.proj is None,
        f"an input of {height}x{width} pixels that is not square": height != width,
    }
    reasons = [reason for reason, found in refused.items() if found]
    if reasons:
        raise ExportError(f"an image encoder with {' and '.join(reasons)} cannot be exported")


def _layer_scale(module: nn.Module) -> Tensor | None:
    gamma = getattr(module, "gamma", None)
    return None if gamma is None else gamma.detach().float()
