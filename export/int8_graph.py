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
    """Replace the sites by 8-bit products, with a scale by group and a product by weight name."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    for group, members in groups.items():
        if not _fold(graph, members, scales[group]):
            for site in members:
                _shift_input(graph, site, scales[group])
    for site in sites:
        _replace(graph, site, scales[site.group].step, products[site.weight])


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


def _replace(graph: ir.Graph, site: Site, step: np.float32, product: Product) -> None:
    """Make a site's input and weight 8-bit, and add the product's bias to its result."""
    node, name = site.node, site.weight
    value = node.inputs[0]
    assert value is not None
    scale = _initializer(graph, f"{name}.input_scale", np.asarray(step, np.float32))
    zero = _initializer(graph, f"{name}.input_zero", np.asarray(0, np.uint8))
    value = _insert(graph, node, "QuantizeLinear", [value, scale, zero], f"{name}.quantize")
    value = _insert(graph, node, "DequantizeLinear", [value, scale, zero], f"{name}.input")
    weight = [
        _initializer(graph, f"{name}.int8", product.weight),
        _initializer(graph, f"{name}.int8_scale", product.step),
        _initializer(graph, f"{name}.int8_zero", np.zeros(product.step.shape, np.int8)),
    ]
    node.replace_input_with(0, value)
    node.replace_input_with(
        1, _insert(graph, node, "DequantizeLinear", weight, f"{name}.dequantized", {"axis": 1})
    )
    _add_bias(graph, site, product.bias)


def _add_bias(graph: ir.Graph, site: Site, bias: Floats) -> None:
    """Add a bias to a site's result, in the sum that follows where that has a constant already."""
    result = site.node.outputs[0]
    users = list(result.uses())
    if len(users) == 1 and users[0].node.op_type == "Add":
        add, place = users[0].node, 1 - users[0].idx
        constant = add.inputs[place]
        if constant is not None and _is_constant(constant):
            added = _initializer(graph, f"{constant.name}.int8", _constant(constant) + bias)
            add.replace_input_with(place, added)
            return
    add = ir.node("Add", [result, _initializer(graph, f"{site.weight}.bias", bias)])
    add.name = add.outputs[0].name = f"{site.weight}.biased"
    graph.insert_after(site.node, add)
    for user in users:
        user.node.replace_input_with(user.idx, add.outputs[0])


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
