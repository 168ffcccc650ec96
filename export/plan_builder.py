"""The process in which TensorRT builds plans, so that its crash costs nothing and its memory comes back.

It reads a job as one line of JSON from its standard input, and gives up when that is closed. It writes
events, one JSON object a line, to its standard output:

```
{"event": "progress", "graph": ..., "phase": ..., "share": 0 to 1}
{"event": "built", "graph": ..., "scratch_bytes": ..., "fused_attention": ..., "seconds": ...}
{"event": "failed", "graph": ..., "reason": ...}   the last one
{"event": "stopped"}                               the last one, when it was told to give up
```
Only calls that TensorRT 10.13 and later and 11.x have in common are used.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geoengine.engine.backends.cuda import Cuda, mib
from geoengine.engine.backends.plans import PlanConfig, Profile, write_whole
from geoengine.engine.backends.tensorrt_runner import collecting_logger, load_tensorrt
from geoengine.engine.errors import ExportError, GeoEngineError

Send = Callable[[Mapping[str, Any]], None]

_WORKSPACE_BYTES = 8 << 30
"""Scratch memory that a single layer may try; too little silently loses the fastest kernels."""


class Stop:
    """Set when the build shall end."""

    def __init__(self) -> None:
        self.wanted = False

    def watch(self, file: int) -> None:
        """Read the file to its end, then want to stop; for a thread of its own."""
        while os.read(
            file, 1024
        ):  # not through a buffer, which could not be closed while a thread waits in it
            pass
        self.wanted = True


class _Stopped(Exception):
    pass


def main() -> int:
    """Build the plans of the job on standard input; returns the exit status."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the events
    job = json.loads(sys.stdin.readline())
    stop = Stop()
    threading.Thread(target=stop.watch, args=(0,), daemon=True).start()
    lock = threading.Lock()

    def send(event: Mapping[str, Any]) -> None:
        with lock:
            try:
                events.write(json.dumps(event) + "\n")
                events.flush()
            except OSError:
                stop.wanted = True  # nobody listens any more

    return run_job(job, send, stop)


def run_job(job: Mapping[str, Any], send: Send, stop: Stop) -> int:
    """Build `job["plans"]`; returns the exit status.

    Each is {graph, onnx, plan, profiles, exact}: the graph's name, the absolute paths of its file and of the
    plan to write, the batches, and the nodes that may multiply matrices in fp32. `job["config"]` is a
    `PlanConfig` as JSON, `job["cache"]` the path of the timing cache.
    """
    graph = ""
    try:
        builder = PlanBuilder(PlanConfig(**job["config"]), Path(job["cache"]), stop)
        for entry in job["plans"]:
            graph = entry["graph"]
            start = time.perf_counter()

            def report(phase: str, share: float, graph: str = graph) -> None:
                send({"event": "progress", "graph": graph, "phase": phase, "share": share})

            source, target = Path(entry["onnx"]), Path(entry["plan"])
            facts = builder.build(source, target, entry["profiles"], entry["exact"], report)
            send({"event": "built", "graph": graph, "seconds": time.perf_counter() - start, **facts})
    except _Stopped:
        send({"event": "stopped"})
        return 1
    except GeoEngineError as error:
        send({"event": "failed", "graph": graph, "reason": str(error)})
        return 1
    return 0


class PlanBuilder:
    """Builds plans, one after another, with one configuration and one timing cache."""

    def __init__(self, config: PlanConfig, cache: Path, stop: Stop) -> None:
        self._trt = load_tensorrt()
        self._cuda = Cuda()
        self._config, self._cache, self._stop = config, cache, stop
        self._logger = collecting_logger(self._trt)
        try:
            self._builder = self._trt.Builder(self._logger)
            self._runtime = self._trt.Runtime(self._logger)
        except TypeError as error:  # what the bindings raise when TensorRT gives nothing back
            raise ExportError(f"TensorRT does not start: {self._logger.last()}") from error

    def build(
        self,
        onnx: Path,
        target: Path,
        profiles: Sequence[Profile],
        exact: Sequence[str],
        report: Callable[[str, float], None],
    ) -> dict[str, int]:
        """Build the plan of an ONNX file into `target`; returns what is known of it only now.

        `exact` names the nodes that may multiply matrices in fp32. Raises ExportError naming the node or the
        layer where TensorRT gives up, and why.
        """
        self._logger.errors.clear()
        network = self._parse(onnx)
        check_network(self._trt, network, onnx.name, exact)
        self._check_memory(network, onnx, profiles[-1][2])
        config = self._configure(network, onnx, profiles, report)
        plan = self._builder.build_serialized_network(network, config)
        cache = config.get_timing_cache()
        if cache is not None:  # also after a build that failed: what was measured need not be measured again
            write_whole(self._cache, bytes(memoryview(cache.serialize())))
        if self._stop.wanted:
            raise _Stopped
        if plan is None:
            raise ExportError(f"TensorRT cannot build {onnx.name}: {self._logger.last()}")
        facts = self._inspect(plan, onnx.name, exact)
        target.write_bytes(plan)
        return facts

    def _parse(self, onnx: Path) -> Any:  # noqa: ANN401 - INetworkDefinition
        trt = self._trt
        # The number of the flag differs between TensorRT 10 and 11; only its name is the same.
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._builder.create_network(typed)
        # Kept, because the weights are the parser's until the network is built.
        self._parser = trt.OnnxParser(network, self._logger)
        if not self._parser.parse_from_file(str(onnx)):
            reasons = []
            for index in range(self._parser.num_errors):
                error = self._parser.get_error(index)
                reasons.append(f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}")
            told = "; ".join(reasons) or self._logger.last()
            raise ExportError(f"TensorRT {trt.__version__} cannot read {onnx.name}: {told}")
        return network

    def _configure(
        self,
        network: Any,  # noqa: ANN401 - INetworkDefinition
        onnx: Path,
        profiles: Sequence[Profile],
        report: Callable[[str, float], None],
    ) -> Any:  # noqa: ANN401 - IBuilderConfig
        trt, settings = self._trt, self._config
        config = self._builder.create_builder_config()
        workspace = min(_WORKSPACE_BYTES, self._cuda.free_bytes() // 2)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        config.builder_optimization_level = settings.level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # `check_layers` reads the details
        for name, on in settings.flags.items():
            (config.set_flag if on else config.clear_flag)(getattr(trt.BuilderFlag, name))
        source = network.get_input(0)
        tail = tuple(source.shape)[1:]
        for batches in profiles:
            profile = self._builder.create_optimization_profile()
            profile.set_shape(source.name, *((batch, *tail) for batch in batches))
            if config.add_optimization_profile(profile) < 0:
                raise ExportError(
                    f"TensorRT refuses batches {batches} for {onnx.name}: {self._logger.last()}"
                )
        self._set_cache(config)
        self._monitor = progress_monitor(trt, report, self._stop)  # kept until the build is over
        config.progress_monitor = self._monitor
        return config

    def _set_cache(self, config: Any) -> None:  # noqa: ANN401 - IBuilderConfig
        """Use the timing cache of earlier builds, or an empty one when there is none that fits."""
        known = self._cache.read_bytes() if self._cache.is_file() else b""
        for content in dict.fromkeys((known, b"")):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return
        raise ExportError(f"TensorRT takes no timing cache: {self._logger.last()}")

    def _check_memory(self, network: Any, onnx: Path, batch: int) -> None:  # noqa: ANN401
        """Raise ExportError when input, output and the widest layer of the largest batch cannot fit."""
        source, result = network.get_input(0), network.get_output(0)
        pixels, tokens = 0, _elements(source.shape)
        if source.dtype == self._trt.uint8:
            pixels, tokens = tokens, _elements(result.shape)
        # Pixels in uint8 and fp16. A transformer's widest tensors, per element of its tokens: four times the
        # width and three for attention in fp16, residual and normalised values in fp32.
        needed = batch * (pixels * 3 + tokens * (7 * 2 + 2 * 4))
        free = self._cuda.free_bytes()
        if needed > free:
            raise ExportError(
                f"{onnx.name} needs about {mib(needed)} of GPU memory for batches of {batch}, and "
                f"{self._cuda.info.name} has {mib(free)} free: close what else uses the GPU, or build with a "
                "smaller --max-batch"
            )

    def _inspect(self, plan: Any, name: str, exact: Sequence[str]) -> dict[str, int]:  # noqa: ANN401
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ExportError(
                f"TensorRT refuses the plan of {name} that it just built: {self._logger.last()}"
            )
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return {
            "scratch_bytes": engine.device_memory_size_v2,
            "fused_attention": check_layers(text, name, exact),
        }


def check_network(trt: Any, network: Any, name: str, exact: Sequence[str]) -> None:  # noqa: ANN401
    """Raise ExportError unless every matrix product of a parsed network, but for `exact` ones, gives fp16.

    In a strongly typed network that is what will be computed.
    """
    products = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.EINSUM)
    found, wrong = 0, []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type not in products or layer.name in exact:
            continue
        found += 1
        if layer.get_output(0).dtype != trt.float16:
            wrong.append(layer.name)
    if not found or wrong:
        told = f"{len(wrong)} of {found} are not, the first of them {wrong[0]!r}" if wrong else "it has none"
        raise ExportError(f"{name} must have its matrix products in fp16, and {told}: export the fp16 graphs")


def check_layers(text: str, name: str, exact: Sequence[str]) -> int:
    """Raise ExportError when a built plan multiplies matrices in fp32; returns its fused attention blocks.

    `text` is the engine inspector's JSON, whose words differ between versions: a product counts as fp32 when
    its tensors or its kernel are named so, and nothing of it is named fp16. Those of the nodes `exact` may
    be.
    """
    try:
        layers = [layer for layer in json.loads(text)["Layers"] if isinstance(layer, dict)]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"TensorRT does not say what the plan of {name} consists of ({error})") from error
    if not layers:
        raise ExportError(f"TensorRT names no layers of the plan of {name}")
    attention = 0
    for layer in layers:
        kind, kernel = str(layer.get("LayerType", "")).lower(), str(layer.get("TacticName", "")).lower()
        if "mha" in kind or "mha" in kernel:
            attention += "[profile " not in str(layer.get("Name"))  # the first profile's have no such mark
        elif _is_product(kind, kernel) and _is_float(layer, kernel) and not _mentions(layer, exact):
            raise ExportError(
                f"TensorRT chose an fp32 matrix product in {name}: layer {layer.get('Name')!r} runs "
                f"{kernel!r}"
            )
    return attention


def _mentions(layer: Mapping[str, Any], nodes: Sequence[str]) -> bool:
    return any(re.search(rf"\b{re.escape(node)}(?!\d)", str(layer)) for node in nodes)


def _is_product(kind: str, kernel: str) -> bool:
    return "gemm" in kernel or any(word in kind for word in ("gemm", "matrixmultiply", "matmul"))


def _is_float(layer: Mapping[str, Any], kernel: str) -> bool:
    tensors = [
        tensor for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ())) if isinstance(tensor, dict)
    ]
    said = " ".join(
        str(value) for tensor in tensors for key, value in tensor.items() if key != "Name"
    ).lower()
    if any(word in said for word in ("half", "fp16")) or any(
        word in kernel for word in ("f16", "h16", "hgemm")
    ):
        return False
    return any(word in said for word in ("float", "fp32")) or any(word in kernel for word in ("f32", "sgemm"))


def progress_monitor(trt: Any, report: Callable[[str, float], None], stop: Stop) -> Any:  # noqa: ANN401
    """Return TensorRT's progress monitor that reports (phase, share of the whole) and can end the build.

    TensorRT calls it from several threads; phases nest, and a phase's steps are those of its parent's step.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # name: parent, steps, steps done

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase or None, num_steps, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                parent, steps, _ = self._phases.get(phase_name, (None, 0, 0))
                self._phases[phase_name] = (parent, steps, step + 1)
                share = self._share(phase_name)
            report(phase_name, share)
            return not stop.wanted

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _share(self, name: str | None) -> float:
            share = 0.0
            for _ in range(len(self._phases)):
                if name not in self._phases:
                    break
                name, steps, done = self._phases[name]
                share = min((done + share) / max(steps, 1), 1.0)
            return share

    return Monitor()


def _elements(shape: Any) -> int:  # noqa: ANN401 - Dims
    """Return the number of elements of one row of a batch."""
    count = 1
    for size in tuple(shape)[1:]:
        count *= max(size, 1)
    return count


if __name__ == "__main__":
    sys.exit(main())
