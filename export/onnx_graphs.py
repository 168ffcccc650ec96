"""Trunks and heads as ONNX files: stable weight names, dynamic batch, weights that several graphs share.

A graph is drawn once from a template whose weights are random, because the exporter merges equal weights and
renames them; then the real weights are filled in by name, for as many files as there are encoders.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.model import Head, Trunk, Weights, in_variant, parts
from geoengine.export.weight_file import WeightFile

OPSETS = {Variant.fp32: 18, Variant.fp16: 18, Variant.fp16_attention: 23}
"""The variants that are written here. LayerNormalization is one node from 17 on, Attention from 23 on."""

MAX_BATCH = 4096  # with CLIP's 50 tokens, above about 14 000 tensors pass 2**31 elements
_SMALL_BYTES = 1024  # tensors under this size stay inside the graph


def write_trunks(trunks: Mapping[int, Trunk], folder: Path, *, variant: Variant) -> dict[int, Path]:
    """Write a trunk file per picture side, `trunk.<side>.<variant>.onnx`, beside `trunk.weights`.

    All `trunks` are float32 and hold the same weights but for the resize. What other graphs have already put
    into the weight file is used again. Returns the paths of the ONNX files by side. Raises ExportError for
    weights that the variant cannot hold.
    """
    weights = WeightFile(folder / "trunk.weights")
    paths = {}
    for side, trunk in trunks.items():
        module = in_variant(trunk, variant)
        model = _draw(module, torch.zeros((2, side, side, 3), dtype=torch.uint8), variant)
        paths[side] = folder / f"trunk.{side}.{variant}.onnx"
        _save(model, module, weights, paths[side])
    return paths


def write_heads(heads: Iterable[tuple[str, Head]], folder: Path, *, variant: Variant) -> dict[str, Path]:
    """Write a file per encoder, `head_<encoder>.<variant>.onnx`, beside `head_<encoder>.weights`.

    `heads` gives encoder names and their float32 heads, one at a time; all must be of one architecture. What
    other graphs have already put into the weight files is used again. Returns the paths by encoder. Raises
    ExportError for weights that the variant cannot hold.
    """
    drawn = None
    paths = {}
    for encoder, head in heads:
        module = in_variant(head, variant)
        if drawn is None:
            drawn = _draw(module, torch.zeros((2, head.tokens, head.width)), variant)
        paths[encoder] = folder / f"head_{encoder}.{variant}.onnx"
        _save(drawn.clone(), module, WeightFile(folder / f"head_{encoder}.weights"), paths[encoder])
    return paths


def _draw(module: Trunk | Head, sample: torch.Tensor, variant: Variant) -> ir.Model:
    """Trace the module with a dynamic batch; the result's weights are random, its names are the module's."""
    generator = torch.Generator().manual_seed(0)
    random = {
        id(parameter): nn.Parameter(
            (torch.rand(parameter.shape, generator=generator) + 0.5).to(parameter.dtype), requires_grad=False
        )
        for parameter in module.parameters()
    }
    template = copy.deepcopy(module, random)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's dependencies warn of their own coming changes
        program = torch.onnx.export(
            template,
            (sample,),
            dynamo=True,
            opset_version=OPSETS[variant],
            input_names=[module.input_name],
            output_names=[module.output_name],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    if program is None:
        raise ExportError("PyTorch's ONNX exporter gave no result")
    model = program.model
    lost = [name for name, _ in template.named_parameters() if name not in model.graph.initializers]
    if lost:
        raise ExportError(f"PyTorch's ONNX exporter renamed or folded the weight {lost[0]}")
    _strip(model)
    return model


def _strip(model: ir.Model) -> None:
    """Drop what tells of the machine and the Python code, so that equal encoders give equal files."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _save(model: ir.Model, module: Weights, weights: WeightFile, path: Path) -> None:
    _fill(model, module)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _SMALL_BYTES and not name.startswith("resize_"):
            value.const_value = weights.place(tensor)
    ir.save(model, path)
    check_graph(path)


def _fill(model: ir.Model, module: Weights) -> None:
    """Put the module's weights into the drawn graph; matrices that float16 holds exactly are stored so."""
    for prefix, part in parts(module):
        for name, parameter in part.named_parameters(recurse=False):
            value = model.graph.initializers[prefix + name]
            source, scale = part.folded.get(name, (parameter.data, None))
            full = parameter.dtype == torch.float32 and source.ndim > 1
            small = _half(source) if full else None
            if small is None:
                value.const_value = ir.Tensor(parameter.data.numpy(), name=value.name)
            else:
                _store_half(model.graph, value, small, scale)


def _store_half(graph: ir.Graph, value: ir.Value, small: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Replace a weight by its float16 form, a cast, and a product with the constant folded into it."""
    name = str(value.name)
    del graph.initializers[name]
    nodes = [ir.node("Cast", [_add_initializer(graph, f"{name}.half", small)], {"to": ir.DataType.FLOAT})]
    if scale is not None:
        nodes[0].outputs[0].name = f"{name}.full"
        nodes.append(ir.node("Mul", [nodes[0].outputs[0], _add_initializer(graph, f"{name}.scale", scale)]))
    for node in nodes:
        node.name = f"{name}.{node.op_type}"
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    result = nodes[-1].outputs[0]
    value.replace_all_uses_with(result)
    result.name = name
    graph.insert_before(graph[0], nodes)


def _add_initializer(graph: ir.Graph, name: str, tensor: torch.Tensor) -> ir.Value:
    constant = ir.Tensor(tensor.contiguous().numpy(), name=name)
    value = ir.Value(
        name=name, shape=constant.shape, type=ir.TensorType(constant.dtype), const_value=constant
    )
    graph.register_initializer(value)
    return value


def _half(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor as float16, or None where that would change a value."""
    small = tensor.half()
    return small if torch.equal(small.float(), tensor) else None


def check_graph(path: Path) -> None:
    """Raise ExportError unless the full ONNX checker and strict shape inference accept a file."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph {path.name} is not valid ONNX: {error}") from error
