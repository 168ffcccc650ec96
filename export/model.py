"""The encoders as ONNX graphs, spelled out: a trunk that all share and a head for each.

The weights come from the tower, and so do the numbers. What differs is the form: stable weight names,
attention with its scale folded into the query weights, and of a last block only what the pooling uses.
Preprocessing is inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from geoengine.engine.manifest import Variant
from geoengine.export.drawing import Drawing
from geoengine.export.resample import WEIGHT_PREFIX, band, resize_matrix
from geoengine.export.towers import (
    Activation,
    BlockParts,
    Dense,
    FeedForward,
    LatentPool,
    Pool,
    TowerParts,
    tower_parts,
)

_FLOAT = ir.DataType.FLOAT

# (pixel - 128) / 64 is exact in float16, and leaves the patch embedding's weights at a size that float16
# holds in full: with 1 / (255 std) alone in them, many would be subnormal.
_PIXEL_CENTRE = 128.0
_PIXEL_SCALE = 1 / 64

Rgb = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class _Stem:
    """The patch embedding and what follows it before the first block.

    `mean` and `std` are per channel of pixels in 0 to 1; both are folded into the weights.
    """

    parts: TowerParts
    mean: Rgb
    std: Rgb

    def draw(self, drawing: Drawing, patches: ir.Value) -> ir.Value:
        """Patches, scaled pixels [patches, 3 * patch size ** 2], to tokens."""
        parts = self.parts
        kernel = parts.patch.weight.float()  # (width, 3, patch, patch)
        std = torch.tensor(self.std, dtype=torch.float64)
        grey = _PIXEL_CENTRE / 255 - torch.tensor(self.mean, dtype=torch.float64)
        bias = (kernel.double() * (grey / std)[:, None, None]).sum((1, 2, 3))
        if parts.patch.bias is not None:
            bias = bias + parts.patch.bias
        per_input = (255 * _PIXEL_SCALE * std).reciprocal().repeat_interleave(parts.patch_size**2)
        weight = drawing.weight("w_patch", kernel.flatten(1).T, per_input.float()[:, None], half=True)
        x = drawing.op("MatMul", drawing.cast(patches, drawing.products), weight)
        x = drawing.cast(x, _FLOAT)
        if len(parts.prefix):
            # Zeros, to which the position adds what these tokens are. They are made from patches since that
            # needs no shapes at run time; of Pad, ONNX Runtime has no CUDA kernel for opset 23.
            zeros = drawing.with_number("Mul", drawing.part(x, 0, len(parts.prefix)), 0.0)
            x = drawing.op("Concat", zeros, x, axis=1)
        position = torch.cat([parts.prefix.double(), parts.position.double() + bias])
        x = drawing.op("Add", x, drawing.weight("position", position.float()))
        return x if parts.pre_norm is None else drawing.norm("ln_pre", parts.pre_norm, x)


class Trunk:
    """Pictures to tokens: uint8[n, side, side, 3] RGB -> float32[n, tokens, width], class token first.

    `tower` is a vision tower and `blocks` the number of its blocks that the trunk includes. None stands for
    encoders that share not even the patch embedding: tokens are then patches of scaled pixels. `side` is in
    pixels; pictures are resized as Pillow does, unless it is the tower's own. `mean` and `std` are per
    channel of pixels in 0 to 1. Raises ExportError for a tower of a form that is not known here.
    """

    def __init__(self, tower: nn.Module, *, blocks: int | None, side: int, mean: Rgb, std: Rgb) -> None:
        self._parts = tower_parts(tower)
        self._stem = _Stem(self._parts, mean, std)
        self._blocks = blocks
        self.side = side

    def draw(self, variant: Variant) -> ir.Model:
        """Return the graph, from "pixels" to "tokens", with its weights."""
        drawing = Drawing(variant, "pixels", ir.DataType.UINT8, (self.side, self.side, 3))
        x = self._patches(drawing)
        if self._blocks is not None:
            x = self._stem.draw(drawing, x)
            for number, block in enumerate(self._parts.blocks[: self._blocks]):
                x = _Block(drawing, block, f"blocks.{number}.").draw(x)
        return drawing.finish(drawing.cast(x, _FLOAT), "tokens", token_shape(self._parts, self._blocks))

    def _patches(self, drawing: Drawing) -> ir.Value:
        """Resize, cut into patches, and scale: [patches, 3 * patch size ** 2]."""
        patch, grid = self._parts.patch_size, self._parts.grid
        if self.side == self._parts.image_size:
            x = drawing.cast(drawing.input, drawing.products)
            if grid * patch < self.side:
                ends = drawing.integers(grid * patch, grid * patch)
                x = drawing.op("Slice", x, drawing.integers(0, 0), ends, drawing.integers(1, 2))
            x = drawing.reshape(x, grid, patch, grid, patch, 3)
            x = drawing.op("Transpose", x, perm=(0, 1, 3, 5, 2, 4))
        else:
            x = drawing.cast(self._resize(drawing), drawing.products)
        x = drawing.with_number("Sub", x, _PIXEL_CENTRE)
        x = drawing.with_number("Mul", x, _PIXEL_SCALE)
        return drawing.reshape(x, grid * grid, 3 * patch * patch)

    def _resize(self, drawing: Drawing) -> ir.Value:
        """Give the patches of the picture at its new size, float32[grid, grid, 3, patch size, patch size].

        Pillow filters along rows first, and rounds to 8 bits, 0 to 255, after either direction. A patch needs
        only the pixels that its filter reaches: a product for each costs much less than one with the whole
        filter, which is nearly all zeros.
        """
        patch, grid = self._parts.patch_size, self._parts.grid
        matrix = resize_matrix(self.side, self._parts.image_size)
        filters = [band(matrix, number * patch, patch) for number in range(grid)]
        parts = []
        for number, (start, weights) in enumerate(filters):
            x = drawing.part(drawing.input, start, start + weights.shape[1], axis=2)
            x = drawing.op("Transpose", drawing.cast(x, _FLOAT), perm=(0, 3, 1, 2))
            x = drawing.op("MatMul", x, drawing.weight(f"{WEIGHT_PREFIX}columns_{number}", weights.T))
            parts.append(drawing.reshape(x, 1, 3, self.side, patch))
        columns = _to_byte(drawing, drawing.op("Concat", *parts, axis=1))
        parts = []
        for number, (start, weights) in enumerate(filters):
            x = drawing.part(columns, start, start + weights.shape[1], axis=3)
            x = drawing.op("MatMul", drawing.weight(f"{WEIGHT_PREFIX}rows_{number}", weights), x)
            parts.append(drawing.reshape(x, 1, grid, 3, patch, patch))
        return _to_byte(drawing, drawing.op("Concat", *parts, axis=1))


def _to_byte(drawing: Drawing, x: ir.Value) -> ir.Value:
    x = drawing.op("Floor", drawing.with_number("Add", x, 0.5))
    return drawing.op("Clip", x, drawing.number(0.0, _FLOAT), drawing.number(255.0, _FLOAT))


class Head:
    """Tokens to a unit-length embedding: float32[n, tokens, width] -> float32[n, d].

    `tower` is a vision tower, of which the trunk has the first `trunk_layers` blocks; at least one must be
    left. With None the trunk has nothing, and the head also the patch embedding. `mean` and `std` are per
    channel of pixels in 0 to 1. Raises ExportError for a tower of a form that is not known here.
    """

    def __init__(self, tower: nn.Module, *, trunk_layers: int | None, mean: Rgb, std: Rgb) -> None:
        self._parts = tower_parts(tower)
        self._stem = _Stem(self._parts, mean, std)
        self._trunk_layers = trunk_layers

    def draw(self, variant: Variant) -> ir.Model:
        """Return the graph, from "tokens" to "embedding", with its weights."""
        parts = self._parts
        drawing = Drawing(variant, "tokens", _FLOAT, token_shape(parts, self._trunk_layers))
        x = drawing.input
        if self._trunk_layers is None:
            x = self._stem.draw(drawing, x)
        first, last = self._trunk_layers or 0, len(parts.blocks) - 1
        for number, block in enumerate(parts.blocks[first:], first):
            only_first = number == last and parts.pool is Pool.token
            x = _Block(drawing, block, f"blocks.{number}.").draw(x, only_first=only_first)
        drawing.prefix = ""
        x = self._pool(drawing, x)
        if parts.projection is not None:
            x = drawing.dense("projection", parts.projection, x)
        for number, layer in enumerate(parts.perceptron, 1):
            x = drawing.op("Relu", x) if number > 1 else x
            x = drawing.dense(f"projection_{number}", layer, x)
        length = drawing.op("ReduceL2", x, drawing.integers(-1), keepdims=1)
        x = drawing.op("Div", x, drawing.with_number("Max", length, 1e-12))
        return drawing.finish(x, "embedding", (parts.embed_dim,))

    def _pool(self, drawing: Drawing, x: ir.Value) -> ir.Value:
        """Make one row of the last block's tokens."""
        parts = self._parts
        if parts.token_norm is not None:
            x = drawing.norm("ln_post", parts.token_norm, x)
        if parts.first_pooled and parts.pool is not Pool.token:
            x = drawing.part(x, parts.first_pooled, len(parts.prefix) + len(parts.position))
        if parts.pool is Pool.mean:
            x = drawing.op("ReduceMean", x, drawing.integers(1), keepdims=1)
        elif isinstance(parts.pool, LatentPool):
            x = _latent_pool(drawing, parts, parts.pool, x)
        x = drawing.reshape(x, parts.width)
        return x if parts.pool_norm is None else drawing.norm("ln_pool", parts.pool_norm, x)


def token_shape(parts: TowerParts, trunk_layers: int | None) -> tuple[int, int]:
    """Return the number and length of the tokens that a trunk gives."""
    if trunk_layers is None:
        return len(parts.position), 3 * parts.patch_size**2
    return len(parts.prefix) + len(parts.position), parts.width


class _Block:
    """A transformer block: [tokens, width] in and out."""

    def __init__(self, drawing: Drawing, parts: BlockParts, prefix: str) -> None:
        self._drawing, self._parts, self._prefix = drawing, parts, prefix
        self._width = int(parts.out.weight.shape[1])

    def draw(self, x: ir.Value, *, only_first: bool = False) -> ir.Value:
        """Run attention, then the feed-forward part; with `only_first`, give just the first token."""
        drawing, parts, width = self._drawing, self._parts, self._width
        drawing.prefix = self._prefix
        normal = drawing.norm("ln_1", parts.norm, x)
        query_scale = (width // parts.heads) ** -0.5
        if only_first:
            q_part, kv_part = _outputs(parts.qkv, 0, width), _outputs(parts.qkv, width, 3 * width)
            scaled = Dense(q_part.weight, q_part.bias, torch.full((width,), query_scale))
            q = drawing.dense("q", scaled, drawing.part(normal, 0, 1), half=True)
            k, v = drawing.split(drawing.dense("kv", kv_part, normal, half=True), 2, width)
            x = drawing.part(x, 0, 1)
        else:
            scale = torch.ones(3 * width)
            scale[:width] = query_scale
            qkv = drawing.dense("qkv", Dense(parts.qkv.weight, parts.qkv.bias, scale), normal, half=True)
            q, k, v = drawing.split(qkv, 3, width)
        x = drawing.op("Add", x, drawing.dense("out", parts.out, self._attend(q, k, v)))
        return _feed_forward(drawing, parts.feed_forward, x)

    def _attend(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Mix the values: [queries, width] and twice [tokens, width] -> [queries, width]."""
        drawing, heads = self._drawing, self._parts.heads
        if drawing.fused:
            return drawing.op("Attention", q, k, v, scale=1.0, q_num_heads=heads, kv_num_heads=heads)
        q = _by_head(drawing, q, heads, self._width)
        k = _by_head(drawing, k, heads, self._width, transposed=True)
        mixed = drawing.softmax_product(q, k, _by_head(drawing, v, heads, self._width))
        return drawing.reshape(drawing.op("Transpose", mixed, perm=(0, 2, 1, 3)), -1, self._width)


def _by_head(drawing: Drawing, x: ir.Value, heads: int, width: int, *, transposed: bool = False) -> ir.Value:
    """[tokens, width] -> [heads, tokens, depth], or [heads, depth, tokens] where `transposed`."""
    x = drawing.reshape(x, -1, heads, width // heads)
    return drawing.op("Transpose", x, perm=(0, 2, 3, 1) if transposed else (0, 2, 1, 3))


def _feed_forward(drawing: Drawing, parts: FeedForward, x: ir.Value) -> ir.Value:
    hidden = drawing.dense("up", parts.up, drawing.norm("ln_2", parts.norm, x), half=True)
    return drawing.op(
        "Add", x, drawing.dense("down", parts.down, _activate(drawing, parts.activation, hidden))
    )


def _activate(drawing: Drawing, activation: Activation, x: ir.Value) -> ir.Value:
    """Apply the non-linearity, in the forms that engines know to fuse."""
    if activation is Activation.quick_gelu:
        return drawing.op("Mul", x, drawing.op("Sigmoid", drawing.with_number("Mul", x, 1.702)))
    if activation is Activation.gelu:
        inner = drawing.op("Erf", drawing.with_number("Div", x, 2**0.5))
    else:  # tanh(sqrt(2 / pi) * (x + 0.044715 x**3))
        square = drawing.with_number("Mul", drawing.op("Mul", x, x), 0.044715)
        cubic = drawing.op("Mul", x, drawing.with_number("Add", square, 1.0))
        inner = drawing.op("Tanh", drawing.with_number("Mul", cubic, (2 / torch.pi) ** 0.5))
    return drawing.with_number("Mul", drawing.op("Mul", x, drawing.with_number("Add", inner, 1.0)), 0.5)


def _latent_pool(drawing: Drawing, parts: TowerParts, pool: LatentPool, x: ir.Value) -> ir.Value:
    """Pool by attention from a constant query: [tokens, width] -> [1, width]."""
    drawing.prefix = "pool."
    depth = parts.width // pool.heads
    query: Tensor = (pool.query * depth**-0.5).reshape(1, pool.heads, 1, depth)
    q = drawing.weight("query", query, half=True)
    k, v = drawing.split(drawing.dense("kv", pool.kv, x, half=True), 2, parts.width)
    k = _by_head(drawing, k, pool.heads, parts.width, transposed=True)
    mixed = drawing.softmax_product(q, k, _by_head(drawing, v, pool.heads, parts.width))
    x = drawing.dense("out", pool.out, drawing.reshape(mixed, 1, parts.width))
    x = _feed_forward(drawing, pool.feed_forward, x)
    drawing.prefix = ""
    return x


def _outputs(layer: Dense, start: int, end: int) -> Dense:
    """Return some of a dense layer's outputs."""
    return Dense(layer.weight[start:end], None if layer.bias is None else layer.bias[start:end])
