"""Drawing an ONNX graph node by node, with the types and the stored weights of a variant."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor, nn

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.towers import Dense

OPSETS = {Variant.fp32: 18, Variant.fp16: 18, Variant.fp16_attention: 23}
"""The variants that are drawn. LayerNormalization is one node from 17 on, Attention from 23 on."""

_IR_VERSION = 10
_FLOAT, _HALF, _INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64

Array = NDArray[Any]


class Drawing:
    """A graph with one input, and the operators that encoders need.

    `prefix` goes before the names of the nodes and weights that follow, and says where one is. Products are
    of the type `products`, float16 in the fp16 variants; all else that is not between two products is
    float32. Sizes are those of one picture: the batch is the free first dimension.
    """

    def __init__(self, variant: Variant, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
        self.products = _FLOAT if variant == Variant.fp32 else _HALF
        self.fused = variant == Variant.fp16_attention
        self.prefix = ""
        self._opset = OPSETS[variant]
        self._batch = ir.SymbolicDim("batch")
        self.input = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([self._batch, *shape]))
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}

    def finish(self, result: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Model:
        """Return the model, whose output is `result` under another name."""
        result.name, result.shape = name, ir.Shape([self._batch, *shape])
        graph = ir.Graph(
            [self.input],
            [result],
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": self._opset},
            name=f"{self.input.name}_to_{name}",
        )
        return ir.Model(graph, ir_version=_IR_VERSION)

    def op(
        self,
        kind: str,
        *inputs: ir.Value,
        dtype: ir.DataType | None = None,
        **attributes: Any,  # noqa: ANN401  # whatever an operator has
    ) -> ir.Value:
        """Add a node of one output, whose type is `dtype`, or that of the first input."""
        return self._add(kind, inputs, 1, dtype, attributes)[0]

    def _add(
        self,
        kind: str,
        inputs: tuple[ir.Value, ...],
        outputs: int,
        dtype: ir.DataType | None,
        attributes: dict[str, Any],
    ) -> list[ir.Value]:
        node = ir.node(kind, inputs, attributes, num_outputs=outputs)
        node.name = f"{self.prefix}{kind}_{len(self._nodes)}"
        for number, value in enumerate(node.outputs):
            value.name = f"{node.name}.{number}"
            value.type = ir.TensorType(dtype or inputs[0].dtype or _FLOAT)
        self._nodes.append(node)
        return list(node.outputs)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Convert to a type, where `x` is not of it already."""
        return x if x.dtype == dtype else self.op("Cast", x, dtype=dtype, to=dtype)

    def weight(
        self, name: str, value: Tensor | Array, scale: Tensor | None = None, *, half: bool = False
    ) -> ir.Value:
        """Add a weight, times `scale` where given; `half` says that products use it.

        In fp32, a matrix that float16 holds exactly is stored so, and converted and scaled by the graph: half
        the bytes, and the same numbers. Raises ExportError where an fp16 product needs a weight that float16
        cannot hold.
        """
        name = self.prefix + name
        source = _numpy(value)
        factor = None if scale is None else _numpy(scale)
        full = source if factor is None else source * factor
        if half and self.products == _HALF:
            return self._initializer(name, _to_half(full, name))
        small = _exact_half(source) if source.ndim > 1 else None
        if small is None:
            return self._initializer(name, full)
        stored = self.cast(self._initializer(f"{name}.half", small), _FLOAT)
        stored.name = name if factor is None else f"{name}.full"
        if factor is None:
            return stored
        scaled = self.op("Mul", stored, self._initializer(f"{name}.scale", factor))
        scaled.name = name
        return scaled

    def _initializer(self, name: str, value: Array) -> ir.Value:
        if name not in self._initializers:
            tensor = ir.Tensor(np.ascontiguousarray(value), name=name)
            self._initializers[name] = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._initializers[name]

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        """Return a constant without dimensions."""
        return self._initializer(f"{value:g}.{dtype.name.lower()}", np.array(value, dtype.numpy()))

    def integers(self, *values: int) -> ir.Value:
        """Return a constant int64 vector, as shapes and positions are given."""
        return self._initializer("_".join(map(str, values)) + ".int64", np.array(values, np.int64))

    def with_number(self, kind: str, x: ir.Value, value: float) -> ir.Value:
        """Apply an operator of two inputs to `x` and a number."""
        assert x.dtype is not None
        return self.op(kind, x, self.number(value, x.dtype))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Change the sizes after the batch."""
        return self.op("Reshape", x, self.integers(0, *shape))

    def part(self, x: ir.Value, start: int, end: int, *, axis: int = 1) -> ir.Value:
        """Take tokens by their place, or what else an axis counts."""
        return self.op("Slice", x, self.integers(start), self.integers(end), self.integers(axis))

    def split(self, x: ir.Value, count: int, size: int) -> list[ir.Value]:
        """Cut the last axis into `count` parts of equal size."""
        return self._add("Split", (x, self.integers(*[size] * count)), count, None, {"axis": -1})

    def norm(self, name: str, norm: nn.LayerNorm, x: ir.Value) -> ir.Value:
        """Normalise over the last axis, in float32."""
        weight, bias = self.weight(f"{name}_weight", norm.weight), self.weight(f"{name}_bias", norm.bias)
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps)

    def dense(self, name: str, layer: Dense, x: ir.Value, *, half: bool = False) -> ir.Value:
        """Apply a dense layer, `w_<name>` and `b_<name>`; `half` is for results that other products use."""
        weight = self.weight(f"w_{name}", layer.weight.T, layer.scale, half=True)
        x = self.op("MatMul", self.cast(x, self.products), weight)
        if not half:
            x = self.cast(x, _FLOAT)
        if layer.bias is None:
            return x
        return self.op("Add", x, self.weight(f"b_{name}", layer.bias, layer.scale, half=half))

    def softmax_product(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Mix values by attention, in three operators with nothing between them: TensorRT fuses only that.

        `q` is [heads, queries, depth], `k` [heads, depth, tokens] and `v` [heads, tokens, depth].
        """
        return self.op("MatMul", self.op("Softmax", self.op("MatMul", q, k), axis=-1), v)


def _numpy(value: Tensor | Array) -> Array:
    array = value.detach().numpy() if isinstance(value, Tensor) else value
    return array.astype(np.float32, copy=False)


def _exact_half(array: Array) -> Array | None:
    """Return the array as float16, or None where that would change a value."""
    with np.errstate(over="ignore"):
        small = array.astype(np.float16)
    return small if np.array_equal(small, array) else None


def _to_half(array: Array, name: str) -> Array:
    with np.errstate(over="ignore"):
        small = array.astype(np.float16)
    if not np.isfinite(small).all():
        raise ExportError(
            f"the weight {name} cannot be held in float16: its largest value is {np.abs(array).max():.3g}, "
            "and 65504 is the limit; build with --precision fp32"
        )
    return small
