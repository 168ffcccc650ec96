"""The encoders as explicit modules, spelled out for export: a trunk that all share and a head for each.

The weights come from open_clip's `VisionTransformer`, and so do the numbers. What differs is the form: stable
weight names, attention as two plain matrix products with its scale folded into the query weights, and only
the class token carried through the last block. Preprocessing is inside.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx import ops as onnx_ops

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.resample import resize_matrix

OpenClip: TypeAlias = Any  # open_clip's modules are untyped

# (pixel - 128) / 64 is exact in float16, and leaves the patch embedding's weights at a size that float16
# holds in full: with 1 / (255 std) alone in them, many would be subnormal.
_PIXEL_CENTRE = 128.0
_PIXEL_SCALE = 1 / 64


_Part = TypeVar("_Part", bound="Weights")


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
    `halves` names the parameters that `in_variant` turns into float16. `fused` says that attention is to be
    one operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folded: dict[str, tuple[Tensor, Tensor]] = {}
        self.halves: set[str] = set()
        self.fused = False

    def put(self, name: str, value: Tensor, scale: Tensor | None = None, *, half: bool = False) -> None:
        """Register `value`, times `scale` where given, as the parameter `name`; see the class for `half`."""
        value = value.detach().float().contiguous()
        if scale is not None:
            self.folded[name] = (value, scale)
            value = value * scale
        if half:
            self.halves.add(name)
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def put_norm(self, name: str, norm: nn.LayerNorm) -> None:
        """Register a layer normalisation's two parameters as `<name>_weight` and `<name>_bias`."""
        self.put(f"{name}_weight", norm.weight)
        self.put(f"{name}_bias", norm.bias)
        setattr(self, f"{name}_eps", norm.eps)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Apply the layer normalisation `name` over the last axis, in float32."""
        weight, bias = self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")
        return functional.layer_norm(x, weight.shape, weight, bias, getattr(self, f"{name}_eps"))

    def put_dense(
        self, name: str, weight: Tensor, bias: Tensor, scale: Tensor | None = None, *, half_bias: bool = False
    ) -> None:
        """Register a dense layer, weight [outputs, inputs], as `w_<name>` and `b_<name>`.

        `scale` multiplies the outputs. `half_bias` is for results that only other products use.
        """
        self.put(f"w_{name}", weight.T, scale, half=True)
        self.put(f"b_{name}", bias, scale, half=half_bias)

    def dense(self, name: str, x: Tensor) -> Tensor:
        """Apply the dense layer `name`: computed in its matrix's type, given in its bias's."""
        weight, bias = self.get_parameter(f"w_{name}"), self.get_parameter(f"b_{name}")
        return (x.to(weight.dtype) @ weight).to(bias.dtype) + bias


class Block(Weights):
    """A block of open_clip's `ResidualAttentionBlock`: float32[n, tokens, width] in and out."""

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
        self.put_dense("out", attention.out_proj.weight, attention.out_proj.bias, after_attention)
        self.put_dense("up", source.mlp.c_fc.weight, source.mlp.c_fc.bias, half_bias=True)
        self.put_dense("down", source.mlp.c_proj.weight, source.mlp.c_proj.bias, after_mlp)

    def put_attention(self, weight: Tensor, bias: Tensor) -> None:
        """Register the query, key and value projections, float32[3 * width, width], as one matrix."""
        scale = torch.ones(3 * self.width)
        scale[: self.width] = (self.width // self.heads) ** -0.5
        self.put_dense("qkv", weight, bias, scale, half_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run attention over all tokens, then the feed-forward part."""
        q, k, v = self.dense("qkv", self.norm("ln_1", x)).chunk(3, dim=-1)
        return self.finish(x, self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values: [n, queries, width] and twice [n, tokens, width] -> [n, queries, width]."""
        if self.fused:
            mixed, *_ = onnx_ops.attention(
                q, k, v, scale=1.0, q_num_heads=self.heads, kv_num_heads=self.heads
            )
            return mixed
        shape = (self.heads, self.width // self.heads)
        q = q.reshape(-1, q.shape[1], *shape).transpose(1, 2)  # (n, heads, queries, width / heads)
        k = k.reshape(-1, k.shape[1], *shape).permute(0, 2, 3, 1)
        v = v.reshape(-1, v.shape[1], *shape).transpose(1, 2)
        mixed = (q @ k).softmax(-1) @ v
        return mixed.transpose(1, 2).reshape(-1, q.shape[2], self.width)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the attention's result, then the feed-forward part, to the residual stream `x`."""
        x = x + self.dense("out", mixed)
        return x + self.dense("down", self.activation.apply(self.dense("up", self.norm("ln_2", x))))


class ClassBlock(Block):
    """A last block: of its result only the class token is computed, float32[n, 1, width]."""

    def put_attention(self, weight: Tensor, bias: Tensor) -> None:
        """Register the query projection apart from that of keys and values."""
        scale = torch.full((self.width,), (self.width // self.heads) ** -0.5)
        self.put_dense("q", weight[: self.width], bias[: self.width], scale, half_bias=True)
        self.put_dense("kv", weight[self.width :], bias[self.width :], half_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run attention from the class token to all tokens, then the feed-forward part for it alone."""
        normal = self.norm("ln_1", x)
        k, v = self.dense("kv", normal).chunk(2, dim=-1)
        return self.finish(x[:, :1], self.attend(self.dense("q", normal[:, :1]), k, v))


class Trunk(Weights):
    """Pictures to tokens: uint8[n, side, side, 3] RGB -> float32[n, tokens, width], class token first.

    `tower` is an open_clip vision tower and `blocks` the number of its blocks that the trunk includes. `side`
    is in pixels; pictures are resized as Pillow does, unless it is the tower's own. `mean` and `std` are per
    channel of pixels in 0 to 1. Raises ExportError for a tower of a form that is not known here.
    """

    input_name, output_name = "pixels", "tokens"
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
        per_input = torch.tensor(std).repeat_interleave(self.patch**2).mul(255 * _PIXEL_SCALE).reciprocal()
        self.put("w_patch", kernel.flatten(1).T, per_input[:, None], half=True)
        grey = torch.tensor(_PIXEL_CENTRE / 255, dtype=torch.float64)
        offset = (grey - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)
        bias = (kernel.double() * offset[:, None, None]).sum((1, 2, 3))
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
        x = torch.floor(x @ self.resize_columns + 0.5).clamp(0.0, 255.0)
        return torch.floor(self.resize_rows @ x + 0.5).clamp(0.0, 255.0)

    def forward(self, pixels: Tensor) -> Tensor:
        """Resize, embed the patches, and run the trunk's blocks."""
        grid, patch = self.image_size // self.patch, self.patch
        x = self.resize(pixels) if self.resizes else pixels.permute(0, 3, 1, 2)
        x = (x.to(self.w_patch.dtype) - _PIXEL_CENTRE) * _PIXEL_SCALE
        x = x.reshape(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(-1, grid * grid, 3 * patch * patch) @ self.w_patch
        x = x.float() + self.position
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

    input_name, output_name = "tokens", "embedding"
    projection: Tensor

    def __init__(self, tower: OpenClip, *, trunk_layers: int) -> None:
        super().__init__()
        check_tower(tower)
        self.tokens, self.width = tower.positional_embedding.shape
        *blocks, last = tower.transformer.resblocks[trunk_layers:]
        self.blocks = nn.ModuleList([*map(Block, blocks), ClassBlock(last)])
        self.put_norm("ln_post", tower.ln_post)
        self.put("projection", tower.proj, half=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the remaining blocks and project the class token."""
        for block in self.blocks:
            tokens = block(tokens)
        x = (self.norm("ln_post", tokens[:, 0]).to(self.projection.dtype) @ self.projection).float()
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / length.clamp_min(1e-12)


def in_variant(module: _Part, variant: Variant) -> _Part:
    """Return a float32 trunk or head as `variant` computes it; what does not change is shared, not copied.

    In float16 are the matrix products with their weights, and softmax and activation between them. In float32
    stay inputs and outputs, layer normalisations and the residual stream. Raises ExportError for a weight
    that float16 cannot hold.
    """
    kept: dict[int, Any] = {}  # what copy.deepcopy is to take for an object, by the object's id
    for prefix, part in parts(module):
        for name, parameter in part.named_parameters(recurse=False):
            half = variant != Variant.fp32 and name in part.halves
            kept[id(parameter)] = _to_half(parameter, prefix + name) if half else parameter
        for source, scale in part.folded.values():
            kept |= {id(source): source, id(scale): scale}
    copied = copy.deepcopy(module, kept)
    for _, part in parts(copied):
        part.fused = variant == Variant.fp16_attention
    return copied


def parts(module: Weights) -> Iterator[tuple[str, Weights]]:
    """Yield a trunk or head and its blocks, each with the prefix of its parameters' full names."""
    for name, part in module.named_modules():
        if isinstance(part, Weights):
            yield f"{name}." if name else "", part


def _to_half(parameter: Tensor, name: str) -> nn.Parameter:
    half = parameter.data.half()
    if not bool(half.isfinite().all()):
        largest = float(parameter.abs().max())
        raise ExportError(
            f"the weight {name} cannot be held in float16: its largest value is {largest:.3g}, and 65504 is "
            "the limit; build with --precision fp32"
        )
    return nn.Parameter(half, requires_grad=False)


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
