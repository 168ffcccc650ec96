"""Tiny engine bundles whose graphs are said to be fp16, for backends that are emulated."""

import json

import onnx
from tiny_bundle import write_manifest, write_tiny_bundle

from geoengine.engine.bundle import EngineBundle


def write_fp16_bundle(folder):
    """The tiny bundle as another variant; its trunk for 16 pixels has a node "resize" with such a matrix."""
    write_tiny_bundle(folder)
    manifest = json.loads((folder / "manifest.json").read_text().replace("fp32", "fp16"))
    for file in folder.glob("onnx/*"):
        file.rename(file.with_name(file.name.replace("fp32", "fp16")))
    file = folder / "onnx" / "trunk.16.fp16.onnx"
    model = onnx.load(file)
    [weight] = [tensor for tensor in model.graph.initializer if tensor.name == "dense"]
    [node] = [node for node in model.graph.node if node.op_type == "MatMul"]
    weight.name = node.input[1] = "resize_rows"
    node.name = "resize"
    onnx.save(model, file)
    write_manifest(folder, manifest)
    return EngineBundle.open(folder)
