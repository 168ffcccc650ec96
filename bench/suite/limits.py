"""How fast this machine could do a stage at best: measured rates of memory, decoding and matrix products.

On a CPU, rates are of one processor's time: bytes, tiles and floating-point operations (a product and a sum
are two) for each second that a core works, whatever else the machine does meanwhile. On a GPU they are of
time. A rate is the best of several rounds and of all libraries that are there.
"""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from geoengine.engine.cores import available_cores
from geoengine.engine.manifest import Variant, precision_of
from geoengine.export.resample import resizes

Call: TypeAlias = Callable[[], object]

MODEL, RESIZE = "model", "resize"
_MEMORY_BYTES = 128 << 20  # more than a processor's caches hold
_SIDE = 2048  # of the matrices that are multiplied
_ROUNDS = 5


def graph_flop(graph: Path) -> dict[str, int]:
    """Return the operations of a graph's matrix products for one picture: those of the resize, and the rest.

    They are counted from the shapes in the file, 2 m n k for each product; weights are not read. Needs the
    package onnx.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    shapes = _shapes(onnx.shape_inference.infer_shapes(model).graph)
    found = {MODEL: 0, RESIZE: 0}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        left, right = node.input[0], node.input[1]
        kind = RESIZE if resizes(left) or resizes(right) else MODEL
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        inner = shapes[left][0 if turned else -1]
        found[kind] += 2 * int(np.prod(shapes[node.output[0]])) * inner
    return found


def _shapes(graph: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401 - a GraphProto
    """Return the shapes of a graph's values, with one picture in a batch."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(1 if size.dim_param else size.dim_value for size in sizes)
    return shapes


def measure_limits(variant: Variant, tiles: Sequence[bytes], *, gpu: bool) -> dict[str, Any]:
    """Return the rates that stages are held against, JSON-ready.

    `memory` is in bytes a second, of a copy, each byte read and written; `reading` those of a file that the
    system holds in memory; `decoding` in tiles a second, of the given JPEG or other tiles; `products` in FLOP
    a second, of the precision of a variant, with the library that is fastest, None where there is none.
    """
    precision = str(precision_of(variant))
    library, products = fastest_products(precision, gpu=gpu)
    return {
        "per": "second" if gpu else "processor second",
        "cores": available_cores(),
        "memory": _device_memory() if gpu else host_memory(),
        "host_memory": host_memory(),
        "reading": _reading(tiles),
        "decoding": _decoding(tiles),
        "products": products,
        "products_of": library,
        "precision": precision,
    }


def host_memory() -> float:
    """Return how fast one thread copies memory, in bytes read and written a second."""
    source = np.ones(_MEMORY_BYTES, np.uint8)
    target = np.zeros_like(source)
    return 2 * len(source) / _least(lambda: np.copyto(target, source))


def fastest_products(precision: str, *, gpu: bool) -> tuple[str | None, float | None]:
    """Return the library with the fastest matrix products of a precision here, and its rate in FLOP/s."""
    rates = {}
    for name, make in (_GPU_PRODUCTS if gpu else _PRODUCTS).get(precision, {}).items():
        if importlib.util.find_spec(name.split()[0].lower()) is None:
            continue
        try:
            call, flop = make()
            rates[name] = flop / _least(call, synchronise=gpu)
        except (RuntimeError, NotImplementedError, ImportError, AttributeError):
            continue  # a library that does not compute so on this machine is not the fastest
    if not rates:
        return None, None
    best = max(rates, key=lambda name: rates[name])
    return best, rates[best]


def _reading(tiles: Sequence[bytes]) -> float:
    """Return how fast the bytes of tiles come out of memory in pieces of their size, in bytes a second."""
    everything = io.BytesIO(b"".join(tiles) * max(1, (8 << 20) // max(1, sum(map(len, tiles)))))
    size = max(1, sum(map(len, tiles)) // len(tiles))

    def read() -> None:
        everything.seek(0)
        while everything.read(size):
            pass

    return len(everything.getbuffer()) / _least(read)


def _decoding(tiles: Sequence[bytes]) -> float:
    """Return how many tiles one thread of OpenCV's decoder decodes in a second."""
    import cv2

    buffers = [np.frombuffer(tile, np.uint8) for tile in tiles]
    return len(buffers) / _least(lambda: [cv2.imdecode(data, cv2.IMREAD_UNCHANGED) for data in buffers])


def _least(call: Call, *, synchronise: bool = False) -> float:
    """Return the least seconds of a call: of all the processor's cores, or of the clock on a GPU."""
    clock = time.perf_counter if synchronise else time.process_time
    times = []
    call()
    for _ in range(_ROUNDS):
        start = clock()
        call()
        if synchronise:
            _wait_for_gpu()
        times.append(clock() - start)
    return max(min(times), 1e-9)


def _matrices(dtype: Any) -> Iterator[Any]:  # noqa: ANN401 - a NumPy type
    rng = np.random.default_rng(0)
    while True:
        values = rng.integers(-64, 64, (_SIDE, _SIDE))
        yield values.astype(dtype)


def _torch_products(kind: str, device: str = "cpu") -> tuple[Call, int]:
    import torch

    matrices = _matrices(np.float32)
    a, b = (torch.from_numpy(next(matrices)).to(device, getattr(torch, kind)) for _ in range(2))
    multiply = torch._int_mm if kind == "int8" else torch.mm

    def call() -> object:
        with torch.inference_mode():
            return multiply(a, b)

    return call, 2 * _SIDE**3


def _onnxruntime_products(operator: str, dtype: Any) -> tuple[Call, int]:  # noqa: ANN401
    import onnx
    import onnxruntime

    kinds = {np.float32: onnx.TensorProto.FLOAT, np.uint8: onnx.TensorProto.UINT8}
    matrices = _matrices(np.float32)
    left = (next(matrices) + (64 if dtype is np.uint8 else 0)).astype(dtype)
    right = next(matrices).astype(np.float32 if dtype is np.float32 else np.int8)
    of = onnx.TensorProto.FLOAT if dtype is np.float32 else onnx.TensorProto.INT32
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["a", "b"], ["c"])],
        "products",
        [onnx.helper.make_tensor_value_info("a", kinds[dtype], left.shape)],
        [onnx.helper.make_tensor_value_info("c", of, left.shape)],
        [onnx.numpy_helper.from_array(right, "b")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"a": left}), 2 * _SIDE**3


def _openvino_products(precision: str) -> tuple[Call, int]:
    """Return a chain of products, so that what brings numbers to and from int8 weighs little."""
    import openvino
    from openvino import opset13 as ops

    steps = 4
    matrices = _matrices(np.float32)
    given = ops.parameter([_SIDE, _SIDE], np.float32)
    value = given
    for _ in range(steps):
        weights = ops.constant(next(matrices).astype(np.int8 if precision == "int8" else np.float32))
        if precision == "int8":
            value = ops.fake_quantize(
                value, np.float32(-1), np.float32(1), np.float32(-1), np.float32(1), 256
            )
            weights = ops.multiply(ops.convert(weights, np.float32), np.float32(2**-12))
        value = ops.matmul(value, weights, False, True)
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": available_cores(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = (
        openvino.Core()
        .compile_model(openvino.Model([value], [given], "products"), "CPU", options)
        .create_infer_request()
    )
    data = (next(matrices) / 64).astype(np.float32)
    return lambda: request.infer([data], share_inputs=True, share_outputs=True), steps * 2 * _SIDE**3


_PRODUCTS: dict[str, dict[str, Callable[[], tuple[Call, int]]]] = {
    "fp32": {
        "torch": lambda: _torch_products("float32"),
        "onnxruntime": lambda: _onnxruntime_products("MatMul", np.float32),
        "openvino": lambda: _openvino_products("fp32"),
    },
    "int8": {
        "torch": lambda: _torch_products("int8"),
        "onnxruntime": lambda: _onnxruntime_products("MatMulInteger", np.uint8),
        "openvino": lambda: _openvino_products("int8"),
    },
}
_GPU_PRODUCTS: dict[str, dict[str, Callable[[], tuple[Call, int]]]] = {
    "fp32": {"torch": lambda: _torch_products("float32", "cuda")},
    "fp16": {"torch": lambda: _torch_products("float16", "cuda")},
    "int8": {"torch": lambda: _torch_products("int8", "cuda")},
}


def _device_memory() -> float:
    """Return how fast the GPU copies its memory, in bytes read and written a second; NaN without torch."""
    if importlib.util.find_spec("torch") is None:
        return float("nan")
    import torch

    source = torch.ones(_MEMORY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _MEMORY_BYTES / _least(lambda: target.copy_(source), synchronise=True)


def _wait_for_gpu() -> None:
    import torch

    torch.cuda.synchronize()
