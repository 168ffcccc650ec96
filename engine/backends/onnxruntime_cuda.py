"""The ONNX Runtime backend for NVIDIA GPUs: nothing returns to the CPU between trunk, head and top-k."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geoengine.engine.backends import ONNXRUNTIME_CUDA, choose_variant
from geoengine.engine.backends.batches import Run
from geoengine.engine.backends.cuda import DeviceArray, gpu_info
from geoengine.engine.backends.gpu import GRAPH_BATCHES, PREFERRED_BATCH, GpuBackend, GpuFeed, graph_batch
from geoengine.engine.backends.sessions import Sessions, first_line, load_onnxruntime
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError
from geoengine.engine.manifest import Variant

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, RunOptions, SessionOptions

MAX_BATCH = 1024

_NO_GRAPH = "-1"

_log = logging.getLogger(__name__)


class OnnxRuntimeCuda(GpuBackend):
    """Runs a bundle's graphs in ONNX Runtime on the first GPU.

    Each graph is loaded when it is first needed. All work is on one stream; batches of a usual size run as
    CUDA graphs, for which pictures, tokens and embeddings have fixed places.
    """

    name = ONNXRUNTIME_CUDA
    runs = (Variant.fp16, Variant.fp16_attention, Variant.fp32)
    """Which fp16 form is faster is measured when a bundle is built on a machine with a GPU."""
    batch, max_batch = PREFERRED_BATCH, MAX_BATCH
    provider, device = "CUDAExecutionProvider", "cuda"

    def __init__(
        self, bundle: EngineBundle, *, precision: str | None = None, threads: int | None = None
    ) -> None:
        del threads  # the GPU does the work
        self.variant = choose_variant(bundle, self.name, precision, self.runs)
        self._bundle = bundle
        require_provider(self.provider)
        super().__init__()

    @classmethod
    def require(cls) -> None:
        """Raise BackendError when it cannot run on this machine, whatever the bundle."""
        require_provider(cls.provider)
        gpu_info()

    def _drop(self) -> None:
        self._bindings.clear()
        self._sessions.close()

    def provider_options(self) -> dict[str, str]:
        """Return the provider's options: our stream, true float32 where that is asked for, CUDA graphs."""
        return {
            "device_id": "0",
            "user_compute_stream": str(self._feed.stream),
            "use_tf32": "0",
            "enable_cuda_graph": "1",
            "arena_extend_strategy": "kSameAsRequested",
        }

    def enqueue(self, session: InferenceSession, binding: IOBinding, options: RunOptions) -> None:
        """Put a graph's work on the stream."""
        session.run_with_iobinding(binding, options)

    def _open(self) -> None:
        self._feed = GpuFeed(
            self._cuda, self._bundle, self.variant, self._encode_into, max_batch=self.max_batch
        )
        self._one_arena = share_arena(self.provider)
        self._sessions = Sessions(
            self._bundle, self.name, (self.provider, self.provider_options()), self._configure
        )
        self._bindings: dict[tuple[Path, int, int], tuple[IOBinding, RunOptions]] = {}
        trunk = self._sessions.get(self._trunk(self._bundle.image_size))
        self._token_shape = tuple(int(size) for size in trunk.get_outputs()[0].shape[1:])
        self._tokens = self._cuda.allocate(self.max_batch * 4 * math.prod(self._token_shape), "tokens")
        self._row_bytes = 4 * self._bundle.embed_dim
        self._embeddings = self._cuda.allocate(GRAPH_BATCHES[-1] * self._row_bytes, "embeddings")

    def _configure(self, options: SessionOptions) -> None:
        options.intra_op_num_threads = 1
        # A CUDA graph writes again where its arena once was: no weights may be there by then.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.add_session_config_entry("session.use_env_allocators", "1" if self._one_arena else "0")

    def _trunk(self, side: int) -> Path:
        path = self._bundle.trunk_path(side, self.variant)
        assert path is not None, "pictures come here only at sides that have a trunk"
        return path

    def _encode_into(self, pixels: DeviceArray, runs: Sequence[Run], address: int) -> None:
        """Enqueue trunk and heads for one batch; see `EncodeInto`."""
        trunk = self._trunk(pixels.shape[1])
        heads = [self._bundle.head_path(run.encoder, self.variant) for run in runs]
        count = pixels.shape[0]
        batch = graph_batch(count, min(pixels.room, GRAPH_BATCHES[-1]))
        done = count if batch is None else batch
        pictures = self._array(pixels.address, (done, *pixels.shape[1:]), "|u1")
        self._run(trunk, pictures, self._token_rows(0, done), replayed=batch is not None)
        if batch is not None and len(runs) == 1:
            embeddings = self._array(self._embeddings, (batch, self._bundle.embed_dim), "<f4")
            self._run(heads[0], self._token_rows(0, batch), embeddings, replayed=True)
            self._cuda.move(address, self._embeddings, count * self._row_bytes, self._feed.stream)
            return
        # A CUDA graph is tied to its addresses, and runs may begin anywhere.
        for run, head in zip(runs, heads, strict=True):
            shape = (run.end - run.start, self._bundle.embed_dim)
            embeddings = self._array(address + run.start * self._row_bytes, shape, "<f4")
            self._run(head, self._token_rows(run.start, run.end), embeddings, replayed=False)

    def _token_rows(self, start: int, end: int) -> DeviceArray:
        size = 4 * math.prod(self._token_shape)
        return self._array(self._tokens + start * size, (end - start, *self._token_shape), "<f4")

    def _array(self, address: int, shape: tuple[int, ...], typestr: str) -> DeviceArray:
        return DeviceArray(address, shape, typestr, stream=self._feed.stream)

    def _run(self, path: Path, source: DeviceArray, target: DeviceArray, *, replayed: bool) -> None:
        """Enqueue a graph; `replayed` is for places and shapes that come again, which become a CUDA graph."""
        key = path, source.shape[0], source.address
        session = self._sessions.get(path)
        bound = self._bindings.get(key)
        if bound is None or not replayed:
            # A number names the CUDA graph within its session.
            number = str(len(self._bindings)) if replayed else _NO_GRAPH
            bound = self._bind(session, source, target), self._run_options(number)
            if replayed:
                self._bindings[key] = bound
        try:
            self.enqueue(session, *bound)
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise BackendError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from error

    def _bind(self, session: InferenceSession, source: DeviceArray, target: DeviceArray) -> IOBinding:
        binding = session.io_binding()
        [given], [made] = session.get_inputs(), session.get_outputs()
        for bind, value, array in (
            (binding.bind_input, given, source),
            (binding.bind_output, made, target),
        ):
            dtype = np.dtype(array.typestr)
            bind(value.name, self.device, 0, dtype, array.shape, array.address)
        return binding

    def _run_options(self, graph: str) -> RunOptions:
        options = self._sessions.onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph)
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options


def require_provider(provider: str) -> None:
    """Raise BackendError, with the remedy, when the installed ONNX Runtime was built without a provider."""
    ort = load_onnxruntime()
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {provider}: "
            "pip uninstall -y onnxruntime && pip install --force-reinstall 'geoengine[gpu]'"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()  # NVIDIA's libraries from their wheels


@functools.cache
def share_arena(provider: str) -> bool:
    """Let all sessions of this process take intermediate results from one arena; tells whether that works."""
    ort = load_onnxruntime()
    try:
        memory = ort.OrtMemoryInfo(
            "Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
        )
        arena = ort.OrtArenaCfg({"arena_extend_strategy": 1})  # no more than is asked for
        ort.create_and_register_allocator_v2(provider, memory, {}, arena)
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        _log.warning("ONNX Runtime's sessions take GPU memory each for itself: %s", first_line(error))
        return False
    return True
