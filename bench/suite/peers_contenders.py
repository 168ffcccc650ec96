"""The encoders that are compared: what a user would take instead, and our backends, all over one tower.

Each takes uint8 pictures [n, side, side, 3] in ordinary memory and gives unit embeddings, float32[n, d].
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.suite import fastembed_worker
from geoengine.bench.suite.peers_towers import Tower
from geoengine.engine.backends import (
    GPU_BACKENDS,
    ONNXRUNTIME_CPU,
    ONNXRUNTIME_CUDA,
    OPENVINO,
    TENSORRT,
    open_backend,
)
from geoengine.engine.backends.sessions import load_onnxruntime
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.cores import available_cores
from geoengine.engine.errors import BackendError, GeoEngineError
from geoengine.engine.manifest import PHOTO, SCHEMA, Graphs, Manifest, Variant

BASE = "open_clip fp32 eager"
"""The contender that all others are compared with."""

OURS: dict[str, tuple[Variant, ...]] = {
    TENSORRT: (Variant.fp16,),
    ONNXRUNTIME_CUDA: (Variant.fp16, Variant.fp16_attention),
    OPENVINO: (Variant.int8,),
    ONNXRUNTIME_CPU: (Variant.int8, Variant.fp32),
}
"""What is measured of each of our backends."""

FASTEMBED_HINT = (
    "pip install fastembed (in an environment of its own: its ONNX Runtime overwrites the GPU's), "
    "then --fastembed PYTHON"
)

Encode = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How contenders run: `device` is cpu or cuda, `fastembed` a Python that has it, `backends` ours."""

    batch: int
    device: str = "cpu"
    backends: tuple[str, ...] = (OPENVINO, ONNXRUNTIME_CPU)
    fastembed: str | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer: its name, the modules that it needs, how to get them, and how to open it."""

    name: str
    modules: tuple[str, ...]
    hint: str
    open: Callable[[Tower, Setting, contextlib.ExitStack], Encode]

    def missing(self) -> bool:
        """Return whether a package is not there."""
        return any(importlib.util.find_spec(module) is None for module in self.modules)


def peers_of(setting: Setting) -> list[Peer]:
    """Return the peers that a device has, the one that all are compared with first."""
    gpu = setting.device != "cpu"
    half = "fp16" if gpu else "bf16"
    torch, hint = ("torch", "open_clip"), "pip install 'geoengine[export]'"
    found = [
        Peer(BASE, torch, hint, partial(_torch, half=False, compiled=False)),
        Peer("open_clip fp32 compiled", torch, hint, partial(_torch, half=False, compiled=True)),
        Peer(f"open_clip {half} eager", torch, hint, partial(_torch, half=True, compiled=False)),
        Peer(f"open_clip {half} compiled", torch, hint, partial(_torch, half=True, compiled=True)),
        Peer("ONNX Runtime fp32, stock", ("onnxscript",), "pip install onnxscript", _stock),
    ]
    if gpu:
        return found
    openvino = "pip install 'geoengine[openvino]'"
    return [
        *found,
        Peer("ONNX Runtime int8, dynamic", ("onnxscript",), "pip install onnxscript", _dynamic),
        Peer("OpenVINO fp32", ("openvino",), openvino, partial(_openvino, hint="f32")),
        Peer("OpenVINO bf16", ("openvino",), openvino, partial(_openvino, hint="bf16")),
        Peer("OpenVINO int8, NNCF", ("openvino", "nncf"), "pip install nncf openvino", _nncf),
        Peer("fastembed", () if setting.fastembed else ("fastembed",), FASTEMBED_HINT, _fastembed),
    ]


def open_ours(
    tower: Tower, backends: Sequence[str], threads: int | None = None
) -> Iterator[tuple[str, Encode | BackendError]]:
    """Yield our encoders by name, such as "openvino int8", opened or with the reason why they cannot run."""
    variants = {variant for name in backends for variant in OURS[name]}
    bundle = _bundle(tower, variants)
    for name in backends:
        for variant in OURS[name]:
            try:
                backend = open_backend(bundle, backend=name, precision=variant, threads=threads)
            except BackendError as error:
                yield f"{name} {variant}", error
            else:
                yield f"{name} {variant}", partial(backend.encode, PHOTO)


def check_fastembed(python: str) -> None:
    """Raise GeoEngineError unless a Python can import fastembed."""
    try:
        done = subprocess.run([python, "-c", "import fastembed, PIL"], capture_output=True, text=True)
    except OSError as error:
        raise GeoEngineError(f"--fastembed {python}: cannot be run ({error.strerror or error})") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise GeoEngineError(
            f"--fastembed {python}: that Python does not import fastembed ({reason}); make an environment "
            "for it: python3 -m venv fe && fe/bin/pip install fastembed, then --fastembed fe/bin/python"
        )


def device_of(backends: Sequence[str]) -> str:
    """Return where peers must run to compare with these backends of ours: cuda or cpu."""
    return "cuda" if set(backends) & set(GPU_BACKENDS) else "cpu"


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def _torch(
    tower: Tower, setting: Setting, stack: contextlib.ExitStack, *, half: bool, compiled: bool
) -> Encode:
    import torch

    dtype = torch.float32 if not half else torch.bfloat16 if setting.device == "cpu" else torch.float16
    moved = half or setting.device != "cpu"
    module = copy.deepcopy(tower.module).to(setting.device, dtype) if moved else tower.module
    run = torch.compile(module) if compiled else module

    def encode(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            rows = run(tower.normalised(pixels, setting.device).to(dtype)).float()
            return np.asarray(torch.nn.functional.normalize(rows, dim=-1).cpu().numpy())

    return partial(_whole_batches, encode, setting.batch) if compiled else encode


def _whole_batches(encode: Encode, batch: int, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Fill a batch up with black pictures: another size would be compiled anew, for a minute or more."""
    count = len(pixels)
    if count < batch:
        pixels = np.concatenate([pixels, np.zeros((batch - count, *pixels.shape[1:]), np.uint8)])
    return encode(pixels)[:count]


def _session(tower: Tower, file: Path, providers: list[str]) -> Encode:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = 3
    session = ort.InferenceSession(file, options, providers=providers)

    def encode(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        [rows] = session.run(None, {"pixel_values": tower.normalised(pixels).contiguous().numpy()})
        return _unit(rows)

    return encode


def _stock(tower: Tower, setting: Setting, stack: contextlib.ExitStack) -> Encode:
    gpu = ["CUDAExecutionProvider"] if setting.device != "cpu" else []
    return _session(tower, tower.stock_onnx, [*gpu, "CPUExecutionProvider"])


def _dynamic(tower: Tower, setting: Setting, stack: contextlib.ExitStack) -> Encode:
    """Open ONNX Runtime with scales taken from each batch, the usual one-line quantisation."""
    load_onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = tower.folder / "dynamic.onnx"
    quantize_dynamic(tower.stock_onnx, target, weight_type=QuantType.QInt8)
    return _session(tower, target, ["CPUExecutionProvider"])


def _converted(tower: Tower) -> Any:  # noqa: ANN401 - OpenVINO publishes no types
    """Convert a tower as OpenVINO's guide does, straight from PyTorch."""
    import openvino
    import torch

    example = torch.zeros(1, 3, tower.side, tower.side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of what PyTorch deprecates
        return openvino.convert_model(
            tower.module, example_input=example, input=[-1, 3, tower.side, tower.side]
        )


def _compiled(model: Any, tower: Tower, hint: str | None) -> Encode:  # noqa: ANN401
    """Compile a model with its pictures' normalisation within it, as OpenVINO recommends."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(model)
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    preprocess = steps.input().preprocess().convert_element_type(openvino.Type.f32)
    preprocess.mean([255 * value for value in tower.mean]).scale([255 * value for value in tower.std])
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": available_cores()}
    if hint is not None:
        options["INFERENCE_PRECISION_HINT"] = hint
    request = openvino.Core().compile_model(steps.build(), "CPU", options).create_infer_request()
    return lambda pixels: _unit(np.array(request.infer([pixels])[0]))


def _openvino(tower: Tower, setting: Setting, stack: contextlib.ExitStack, *, hint: str) -> Encode:
    return _compiled(_converted(tower), tower, hint)


def _nncf(tower: Tower, setting: Setting, stack: contextlib.ExitStack) -> Encode:
    """Open OpenVINO after NNCF's static int8, on the pictures that ours are calibrated on too."""
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        import nncf

        from geoengine.export.calibration import calibration_pictures

        pictures = calibration_pictures(None, tower.side)
        data = nncf.Dataset([tower.normalised(pictures[i : i + 1]).numpy() for i in range(len(pictures))])
        model = nncf.quantize(
            _converted(tower), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pictures)
        )
    return _compiled(model, tower, None)


def _fastembed(tower: Tower, setting: Setting, stack: contextlib.ExitStack) -> Encode:
    """Start fastembed over the stock file in a process of its own; a pipe carries the pictures.

    The pipe costs milliseconds for a batch. fastembed decodes no more than ours do: it gets pictures.
    """
    folder = tower.stock_onnx.parent
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": tower.side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": tower.side, "width": tower.side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [setting.fastembed or sys.executable, fastembed_worker.__file__]
    process = subprocess.Popen(
        [*command, str(folder), str(available_cores())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    stack.callback(_end, process)
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout
    if not answers.readline():
        raise GeoEngineError("fastembed's process ended at its start: its own message is above")

    def encode(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        requests.write(json.dumps({"shape": pixels.shape}).encode() + b"\n" + pixels.tobytes())
        requests.flush()
        line = answers.readline()
        if not line:
            raise GeoEngineError("fastembed's process has ended: its own message is above")
        shape = json.loads(line)["shape"]
        data = answers.read(4 * int(np.prod(shape)))
        return np.frombuffer(data, np.float32).reshape(shape)

    return encode


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # of a process that has gone
                pipe.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _MemoryBundle(EngineBundle):
    """A bundle whose manifest is in no file, so that nobody can replace it."""

    __slots__ = ()

    def check_unchanged(self) -> None:
        """Accept it as it is."""


def _bundle(tower: Tower, variants: set[Variant]) -> EngineBundle:
    """Return a bundle of the photo encoder alone with graphs of these variants."""
    from geoengine.export.calibration import calibration_pictures
    from geoengine.export.int8 import quantize_graphs
    from geoengine.export.model import Head, Trunk
    from geoengine.export.onnx_graphs import write_heads, write_trunks

    norms: dict[str, Any] = {"mean": tower.mean, "std": tower.std}
    trunk = Trunk(tower.module, blocks=tower.trunk_blocks, side=tower.side, **norms)
    head = Head(tower.module, trunk_layers=tower.trunk_blocks, **norms)
    graphs: dict[Variant, tuple[dict[int, Path], dict[str, Path]]] = {}
    int8_needs = {Variant.fp32} if Variant.int8 in variants else set()
    for variant in sorted((variants | int8_needs) - {Variant.int8}):
        trunks = write_trunks({tower.side: trunk}, tower.folder, variant=variant)
        graphs[variant] = trunks, write_heads([(PHOTO, head)], tower.folder, variant=variant)
    if Variant.int8 in variants:
        pictures = calibration_pictures(None, tower.side)
        graphs[Variant.int8] = quantize_graphs(*graphs[Variant.fp32], tower.folder, pictures)
    return _MemoryBundle(tower.folder, _manifest(tower, graphs))


def _manifest(tower: Tower, graphs: Mapping[Variant, tuple[dict[int, Path], dict[str, Path]]]) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        geoengine="",
        model="",
        pretrained="none",
        world="earth",
        levels=(),
        embed_dim=int(tower.module.output_dim),
        image_size=tower.side,
        mean=(0.0, 0.0, 0.0),  # our graphs normalise
        std=(1.0, 1.0, 1.0),
        resize_mode="shortest",
        logit_scale={},
        graphs={
            variant: Graphs(
                {side: path.name for side, path in trunks.items()},
                {name: path.name for name, path in heads.items()},
            )
            for variant, (trunks, heads) in graphs.items()
        },
        preferred={},
        weights="",
        files={},
        tools={},
        parity={},
    )
