"""Engine bundles with tiny ONNX graphs, written without PyTorch."""

import hashlib
import itertools
import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

IMAGE_SIZE, TOKENS, WIDTH, EMBED_DIM = 8, 5, 12, 6


def write_tiny_bundle(folder, *, levels=(1, 3), world="planet", sides=(8, 16), embed_dim=EMBED_DIM):
    """A bundle whose trunk is a dense layer and whose heads attend over its tokens; weights are random."""
    rng = np.random.default_rng(0)
    (folder / "onnx").mkdir(parents=True)
    encoders = ["photo", *(f"z{z:02d}" for z in levels)]
    trunks = {str(side): f"onnx/trunk.{side}.fp32.onnx" for side in sides}
    heads = {encoder: f"onnx/head_{encoder}.fp32.onnx" for encoder in encoders}
    for side in sides:
        onnx.save(trunk(rng, side), folder / trunks[str(side)])
    for path in heads.values():
        onnx.save(head(rng, embed_dim), folder / path)
    manifest = {
        "schema": 2,
        "geoengine": "0.1.0",
        "model": "tiny",
        "pretrained": "none",
        "world": world,
        "levels": list(levels),
        "embed_dim": embed_dim,
        "image_size": IMAGE_SIZE,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "resize_mode": "shortest",
        "logit_scale": dict.fromkeys(encoders[1:], 20.0),
        "graphs": {"fp32": {"trunks": trunks, "heads": heads}},
        "preferred": {},
        "weights": "",
        "files": {},
        "tools": {},
        "parity": {},
    }
    write_manifest(folder, manifest)
    return folder


def write_tiny_tiles(folder, *, zooms=(1, 3)):
    """A folder of tiles of 8 x 8 pixels, each of its own noise, for a bundle with `sides=(8,)`."""
    from PIL import Image

    for z in zooms:
        for x, y in itertools.product(range(2**z), repeat=2):
            tile = folder / str(z) / str(x) / f"{y}.png"
            tile.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([z, x, y]).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tile)


def write_manifest(folder, manifest):
    """Write the manifest, with fresh checksums of all other files."""
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*.onnx"))
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def trunk(rng, side):
    """uint8[n, side, side, 3] -> tanh of one dense layer, float32[n, TOKENS, WIDTH]."""
    inputs = side * side * 3
    weights = {
        "dense": rng.normal(size=(inputs, TOKENS * WIDTH)) / (100 * np.sqrt(inputs)),
        "flat": np.array([-1, inputs]),
        "shape": np.array([-1, TOKENS, WIDTH]),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "dense"], ["product"]),
        helper.make_node("Tanh", ["product"], ["tanh"]),
        helper.make_node("Reshape", ["tanh", "shape"], ["tokens"]),
    ]
    return model(
        nodes,
        ("pixels", TensorProto.UINT8, ["n", side, side, 3]),
        ("tokens", ["n", TOKENS, WIDTH]),
        weights,
    )


def head(rng, embed_dim):
    """float32[n, TOKENS, WIDTH] -> unit float32[n, embed_dim], the first token attending to all."""
    weights = {
        "query": rng.normal(size=(WIDTH, WIDTH)),
        "project": rng.normal(size=(WIDTH, embed_dim)),
        "first": np.array([0]),
        "axis": np.array([1]),
    }
    nodes = [
        helper.make_node("Gather", ["tokens", "first"], ["class"], axis=1),  # (n, 1, width)
        helper.make_node("MatMul", ["class", "query"], ["q"]),
        helper.make_node("Transpose", ["tokens"], ["keys"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "keys"], ["logits"]),  # (n, 1, tokens)
        helper.make_node("Softmax", ["logits"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "tokens"], ["mixed"]),  # (n, 1, width)
        helper.make_node("MatMul", ["mixed", "project"], ["projected"]),
        helper.make_node("Squeeze", ["projected", "axis"], ["row"]),
        helper.make_node("LpNormalization", ["row"], ["embedding"], axis=-1, p=2),
    ]
    return model(
        nodes,
        ("tokens", TensorProto.FLOAT, ["n", TOKENS, WIDTH]),
        ("embedding", ["n", embed_dim]),
        weights,
    )


def model(nodes, source, target, weights):
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*source)],
        [helper.make_tensor_value_info(target[0], TensorProto.FLOAT, target[1])],
        [
            numpy_helper.from_array(value if value.dtype.kind == "i" else value.astype(np.float32), name)
            for name, value in weights.items()
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made
