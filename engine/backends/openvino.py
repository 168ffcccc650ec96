"""The OpenVINO backend: int8 graphs on CPUs with instructions for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import OPENVINO, choose_variant
from geoengine.engine.backends.batches import HostBackend, PictureBatch
from geoengine.engine.backends.sessions import first_line
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.cores import available_cores
from geoengine.engine.errors import BackendError
from geoengine.engine.manifest import Variant

if TYPE_CHECKING:
    from openvino import InferRequest

MAX_BATCH = 32
"""Pictures in one run of a graph; bounds memory. Of 4 to 64 it was the fastest on two cores for ViT-B/32."""


class OpenVino(HostBackend):
    """Runs a bundle's int8 graphs in OpenVINO on the CPU.

    Each graph is compiled when it is first needed. One batch runs at a time, on all threads, whichever thread
    called `encode`.
    """

    name, runs = OPENVINO, (Variant.int8,)
    batch = max_batch = MAX_BATCH

    def __init__(
        self, bundle: EngineBundle, *, precision: str | None = None, threads: int | None = None
    ) -> None:
        self.variant = choose_variant(bundle, self.name, precision, self.runs)
        self.threads = available_cores() if threads is None else threads
        self._bundle = bundle
        self._requests: dict[Path, InferRequest] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._core = _load_openvino().Core()

    @staticmethod
    def require() -> None:
        """Raise BackendError when it cannot run on this machine, whatever the bundle."""
        _load_openvino()

    def close(self) -> None:
        """Free the compiled graphs; `encode` raises BackendError afterwards."""
        with self._lock:
            self._closed = True
            self._requests.clear()

    def _encode_batch(self, batch: PictureBatch) -> NDArray[np.float32]:
        embeddings = np.empty((len(batch.pixels), self._bundle.embed_dim), dtype=np.float32)
        with self._lock:  # results lie in the requests' memory until they run again
            tokens = self._run(batch.trunk, np.ascontiguousarray(batch.pixels))
            for run in batch.runs:
                own = slice(run.start, run.end)
                embeddings[own] = self._run(self._head(run.encoder), tokens[own])
        return embeddings

    def _run(self, path: Path, value: NDArray[Any]) -> NDArray[np.float32]:
        if self._closed:
            raise BackendError(f"backend {self.name} is closed")
        if path not in self._requests:
            request = self._load(path)
            self._bundle.check_unchanged()
            self._requests[path] = request
        try:
            results = self._requests[path].infer([value], share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot run {path}: {first_line(error)}") from error
        return np.asarray(results[0])

    def _load(self, path: Path) -> InferRequest:
        options = {
            # By default it is bfloat16 where the CPU has it, and then embeddings differ between machines.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            # Pinned threads of two processes, or of two graphs, would wait for the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            return self._core.compile_model(path, "CPU", options).create_infer_request()
        except RuntimeError as error:
            self._bundle.check_unchanged()
            raise BackendError(f"OpenVINO cannot load {path}: {first_line(error)}") from error


def _load_openvino() -> Any:  # noqa: ANN401 - the module
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"OpenVINO cannot be loaded ({error}): pip install 'geoengine[openvino]'"
        ) from error
    return openvino
