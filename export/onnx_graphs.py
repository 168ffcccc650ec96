"""Trunks and heads as ONNX files, which keep their weights in files that all variants share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.model import Head, Trunk
from geoengine.export.resample import resizes
from geoengine.export.weight_file import WeightFile

MAX_BATCH = 4096
"""Pictures that a graph takes at once; with CLIP's 50 tokens, about 14 000 would pass 2**31 elements."""

_SMALL_BYTES = 1024  # tensors under this size stay inside the graph


def write_trunks(trunks: Mapping[int, Trunk], folder: Path, *, variant: Variant) -> dict[int, Path]:
    """Write a trunk file per picture side, `trunk.<side>.<variant>.onnx`, beside `trunk.weights`.

    What other graphs have already put into the weight file is used again. Returns the paths of the ONNX files
    by side. Raises ExportError for weights that the variant cannot hold.
    """
    weights = WeightFile(folder / "trunk.weights")
    return {
        side: save_graph(trunk.draw(variant), weights, folder / f"trunk.{side}.{variant}.onnx")
        for side, trunk in trunks.items()
    }


def write_heads(heads: Iterable[tuple[str, Head]], folder: Path, *, variant: Variant) -> dict[str, Path]:
    """Write a file per encoder, `head_<encoder>.<variant>.onnx`, beside `head_<encoder>.weights`.

    `heads` gives encoder names and heads. What other graphs have already put into the weight files is used
    again. Returns the paths by encoder. Raises ExportError for weights that the variant cannot hold.
    """
    paths = {}
    for encoder, head in heads:
        weights = WeightFile(folder / f"head_{encoder}.weights")
        try:
            paths[encoder] = save_graph(
                head.draw(variant), weights, folder / f"head_{encoder}.{variant}.onnx"
            )
        except ExportError as error:
            raise ExportError(f"encoder {encoder}: {error}") from error
    return paths


def save_graph(model: ir.Model, weights: WeightFile, path: Path) -> Path:
    """Write a graph with its larger weights beside it; those of a resize are its own and stay inside."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _SMALL_BYTES and not resizes(name):
            value.const_value = weights.place(tensor)
    ir.save(model, path)
    check_graph(path)
    return path


def check_graph(path: Path) -> None:
    """Raise ExportError unless the full ONNX checker and strict shape inference accept a file."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph {path.name} is not valid ONNX: {error}") from error
