"""Trunks and heads as ONNX files: stable weight names, dynamic batch, weights that several trunks share.

A graph is drawn once from a template whose weights are random, because the exporter merges equal weights and
renames them; then the real weights are filled in by name, for as many files as there are encoders.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from geoengine.engine.errors import ExportError
from geoengine.export.model import Head, Trunk, Weights, folded_weights

OPSET = 18  # LayerNormalization is one node from 17 on; every backend reads 18
MAX_BATCH = 4096  # with CLIP's 50 tokens, above about 14 000 tensors pass 2**31 elements
_PAGE_BYTES = 4096  # external tensors start on a page, so that they can be mapped into memory


@dataclass(frozen=True, slots=True)
class _Region:
    """Where a tensor lies in the shared weight file."""

    offset: int
    length: int


def write_trunks(trunks: Mapping[int, Trunk], folder: Path, *, precision: str) -> dict[int, Path]:
    """Write a trunk file per picture side, `trunk.<side>.<precision>.onnx`, beside one file of weights.

    All `trunks` must hold the same weights but for the resize. Returns the paths of the ONNX files by side.
    """
    location = f"trunk.{precision}.weights"
    regions: dict[str, _Region] = {}
    paths = {}
    for side, trunk in trunks.items():
        pixels = torch.zeros((2, side, side, 3), dtype=torch.uint8)
        model = _draw(trunk, pixels, "pixels", "tokens")
        _fill(model, trunk)
        _move_weights(model, folder / location, regions)
        paths[side] = folder / f"trunk.{side}.{precision}.onnx"
        _save(model, paths[side])
    return paths


def write_heads(heads: Iterable[tuple[str, Head]], folder: Path, *, precision: str) -> dict[str, Path]:
    """Write a file per encoder, `head_<encoder>.<precision>.onnx`; all must be of one architecture.

    `heads` gives encoder names and their heads, one at a time. Returns the paths by encoder.
    """
    drawn = None
    paths = {}
    for encoder, head in heads:
        if drawn is None:
            drawn = _draw(head, torch.zeros((2, head.tokens, head.width)), "tokens", "embedding")
        model = drawn.clone()
        _fill(model, head)
        paths[encoder] = folder / f"head_{encoder}.{precision}.onnx"
        _save(model, paths[encoder])
    return paths


def _draw(module: Weights, sample: torch.Tensor, input_name: str, output_name: str) -> ir.Model:
    """Trace the module with a dynamic batch; the result's weights are random, its names are the module's."""
    template = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for parameter in template.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's dependencies warn of their own coming changes
        program = torch.onnx.export(
            template,
            (sample,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[output_name],
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


def _fill(model: ir.Model, module: Weights) -> None:
    """Put the module's weights into the drawn graph; matrices that float16 holds exactly are stored so."""
    folded = folded_weights(module)
    for name, parameter in module.named_parameters():
        source, scale = folded.get(name, (parameter.data, None))
        value = model.graph.initializers[name]
        small = _half(source) if source.ndim > 1 else None
        if small is None:
            value.const_value = ir.Tensor(parameter.data.numpy(), name=name)
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


def _move_weights(model: ir.Model, file: Path, regions: dict[str, _Region]) -> None:
    """Let the graph's weights point into `file`, appending what `regions` lacks; resizes stay inside."""
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or name.startswith("resize_") or tensor.nbytes < 1024:
            continue
        if name not in regions:
            regions[name] = _append(file, tensor.numpy())
        value.const_value = ir.ExternalTensor(
            file.name,
            regions[name].offset,
            regions[name].length,
            tensor.dtype,
            shape=ir.Shape(tensor.numpy().shape),
            name=name,
            base_dir=file.parent,
        )


def _append(file: Path, values: np.ndarray) -> _Region:
    data = np.ascontiguousarray(values)
    with open(file, "ab") as stream:
        stream.write(b"\0" * (-stream.tell() % _PAGE_BYTES))
        offset = stream.tell()
        stream.write(data.tobytes())
    return _Region(offset, data.nbytes)


def _save(model: ir.Model, path: Path) -> None:
    ir.save(model, path)
    check_graph(path)


def check_graph(path: Path) -> None:
    """Raise ExportError unless the full ONNX checker and strict shape inference accept a file."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph {path.name} is not valid ONNX: {error}") from error
