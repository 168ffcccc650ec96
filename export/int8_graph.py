"""Finding the matrix products of an ONNX graph, and putting 8-bit ones in their place.

An 8-bit product is spelled as ONNX Runtime, OpenVINO and others recognise it: QuantizeLinear and
DequantizeLinear on the input, DequantizeLinear on the weight, MatMul.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from geoengine.engine.errors import ExportError
from geoengine.export.int8_scales import Floats, InputScale, Product

PATCH_WEIGHT = "w_patch"
"""The weight whose inputs are pixels."""

_PROJECTION = "w_projection"  # of one row per picture: they cost nothing, and errors in them are not mixed


@dataclass(frozen=True, slots=True)
class Site:
    """A product with a dense layer's weight, `w_*` by its name; the last projections are none.

    `group` names the tensor that its input was sliced from, if it was: sites of one group share their scale.
    """

    node: ir.Node
    weight: str
    input: str
    group: str


def find_sites(graph: ir.Graph) -> list[Site]:
    """Return the products that become 8-bit, in order."""
    sites = []
    for node in graph:
        if node.op_type == "MatMul":
            source, weight = node.inputs
            assert source is not None and weight is not None  # MatMul has two inputs
            name = str(weight.name)
            if name.rpartition(".")[2].startswith("w_") and not name.startswith(_PROJECTION):
                sites.append(Site(node, name, str(source.name), str(_unsliced(source).name)))
    return sites


def weight_of(site: Site) -> Floats:
    """Return a site's weight, float32[inputs, outputs]."""
    weight = site.node.inputs[1]
    assert weight is not None
    return np.ascontiguousarray(_constant(weight), dtype=np.float32)


def rewrite(
    graph: ir.Graph, sites: list[Site], scales: Mapping[str, InputScale], products: Mapping[str, Product]
) -> None:
    """Replace the sites by 8-bit products, with a scale by group and a product by weight name.

    A product whose result is split becomes one for each part, so that nothing is copied.
    """
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    values: dict[str, InputScale] = {}
    for group, members in groups.items():
        mixed = _mixed_values(members)
        if mixed is not None:
            values[mixed] = scales[group]
        elif not _fold(graph, members, scales[group]):
            for site in members:
                _shift_input(graph, site, scales[group])
    for site in sites:
        _replace(graph, site, scales[site.group].step, products[site.weight], values)


def remove_unused(model: ir.Model) -> None:
    """Drop the nodes and weights that nothing reads any more."""
    RemoveUnusedNodesPass()(model)


def _fold(graph: ir.Graph, members: list[Site], scale: InputScale) -> bool:
    """Put a scale into the layer normalisation before a group; False when others read that, or it is none."""
    source = members[0].node.inputs[0]
    assert source is not None
    source = _unsliced(source)
    norm = source.producer()
    nodes = {site.node for site in members}
    if norm is None or norm.op_type != "LayerNormalization" or not _readers(source) <= nodes:
        return False
    gain, offset = norm.inputs[1:]
    assert gain is not None and offset is not None  # our graphs' normalisations have both
    norm.replace_input_with(1, _initializer(graph, f"{gain.name}.int8", _constant(gain) * scale.factor))
    shifted = _constant(offset) * scale.factor + scale.shift
    norm.replace_input_with(2, _initializer(graph, f"{offset.name}.int8", shifted))
    return True


def _shift_input(graph: ir.Graph, site: Site, scale: InputScale) -> None:
    """Compute x * factor + shift before a site."""
    value = site.node.inputs[0]
    assert value is not None
    if not bool((scale.factor == 1).all()):
        factor = _initializer(graph, f"{site.weight}.factor", scale.factor)
        value = _insert(graph, site.node, "Mul", [value, factor], f"{site.weight}.smoothed")
    shift = _initializer(graph, f"{site.weight}.shift", scale.shift)
    value = _insert(graph, site.node, "Add", [value, shift], f"{site.weight}.shifted")
    site.node.replace_input_with(0, value)


def _mixed_values(members: list[Site]) -> str | None:
    """Name the values that attention mixed to a group's input, where a site makes them; None otherwise.

    The weights of a mix sum to one, so what is done to each of its channels, a factor and a shift, can as
    well be done to the values.
    """
    value = members[0].node.inputs[0]
    while len(members) == 1 and value is not None and _has_one_reader(value):
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Split":
            return str(value.name)
        if node.op_type == "MatMul" and _is_softmax(node.inputs[0]):
            value = node.inputs[1]
        elif node.op_type in ("Reshape", "Transpose"):
            value = node.inputs[0]
        else:
            return None
    return None


def _replace(
    graph: ir.Graph, site: Site, step: np.float32, product: Product, values: Mapping[str, InputScale]
) -> None:
    """Compute what a site and its bias give, or each part of it, from 8-bit input and weight.

    `values` has the scales of those parts that are to leave in another scale, by name.
    """
    node, name = site.node, site.weight
    source = node.inputs[0]
    assert source is not None
    scale = _initializer(graph, f"{name}.input_scale", np.asarray(step, np.float32))
    zero = _initializer(graph, f"{name}.input_zero", np.asarray(0, np.uint8))
    x = _insert(graph, node, "QuantizeLinear", [source, scale, zero], f"{name}.quantize")
    x = _insert(graph, node, "DequantizeLinear", [x, scale, zero], f"{name}.input")
    result, bias = _with_bias(node.outputs[0], product.bias)
    parts = _parts(result)
    width = bias.shape[-1] // len(parts)
    for number, part in enumerate(parts):
        own = slice(number * width, (number + 1) * width)
        stem = name if len(parts) == 1 else f"{name}.{number}"
        weight_step, weight_bias = product.step[own], bias[..., own]
        leaving = values.get(str(part.name))
        if leaving is not None:
            weight_step = weight_step * leaving.factor
            weight_bias = weight_bias * leaving.factor + leaving.shift
        weight = [
            _initializer(graph, f"{stem}.int8", product.weight[:, own]),
            _initializer(graph, f"{stem}.int8_scale", weight_step),
            _initializer(graph, f"{stem}.int8_zero", np.zeros(width, np.int8)),
        ]
        w = _insert(graph, node, "DequantizeLinear", weight, f"{stem}.dequantized", {"axis": 1})
        y = _insert(graph, node, "MatMul", [x, w], f"{stem}.product")
        y = _insert(
            graph, node, "Add", [y, _initializer(graph, f"{stem}.bias", weight_bias)], f"{stem}.biased"
        )
        _take_place(y, part)


def _with_bias(result: ir.Value, bias: Floats) -> tuple[ir.Value, Floats]:
    """Return where a product's result has its bias, where it is given one, and that with `bias` added."""
    users = list(result.uses())
    if len(users) == 1 and users[0].node.op_type == "Add":
        add = users[0].node
        constant = add.inputs[1 - users[0].idx]
        if constant is not None and _is_constant(constant):
            return add.outputs[0], _constant(constant) + bias  # where it is a position, one of each token
    return result, bias


def _parts(result: ir.Value) -> list[ir.Value]:
    """Return what a result is split into, or itself."""
    users = list(result.uses())
    if len(users) == 1 and users[0].node.op_type == "Split":
        return list(users[0].node.outputs)
    return [result]


def _take_place(value: ir.Value, of: ir.Value) -> None:
    """Put a value in another's place, which may be that of the graph's result, under its name."""
    value.type, value.shape, name = of.type, of.shape, of.name
    ir.convenience.replace_all_uses_with(of, value, replace_graph_outputs=True)
    of.name, value.name = f"{name}.replaced", name


def _has_one_reader(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1


def _is_softmax(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "Softmax"


def _unsliced(value: ir.Value) -> ir.Value:
    """Return what a value was sliced from, or itself."""
    node = value.producer()
    if node is None or node.op_type != "Slice":
        return value
    source = node.inputs[0]
    assert source is not None
    return _unsliced(source)


def _readers(value: ir.Value) -> set[ir.Node]:
    """Return the nodes that read a value, and for slices those that read them."""
    found: set[ir.Node] = set()
    for user in value.uses():
        node = user.node
        found |= _readers(node.outputs[0]) if node.op_type == "Slice" and user.idx == 0 else {node}
    return found


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return value.const_value is not None
    return node.op_type in ("Cast", "Mul") and all(v is not None and _is_constant(v) for v in node.inputs)


def _constant(value: ir.Value) -> Floats:
    """Return a constant; one stored in float16 comes as a cast, and perhaps a product."""
    node = value.producer()
    if node is None and value.const_value is not None:
        return value.const_value.numpy().astype(np.float32)
    inputs = [] if node is None else [_constant(v) for v in node.inputs if v is not None]
    if node is not None and node.op_type == "Cast":
        return inputs[0]
    if node is not None and node.op_type == "Mul":
        return np.asarray(inputs[0] * inputs[1], np.float32)
    raise ExportError(f"the weight {value.name} is not a constant of the graph")


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Add a constant; the same name again gives the one that is there."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    operator: str,
    inputs: list[ir.Value],
    name: str,
    attributes: Mapping[str, int] | None = None,
) -> ir.Value:
    node = ir.node(operator, inputs, attributes, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]
