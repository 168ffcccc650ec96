"""The ONNX Runtime backend for CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import ONNXRUNTIME_CPU, choose_variant
from geoengine.engine.backends.batches import HostBackend, PictureBatch
from geoengine.engine.backends.sessions import Sessions, first_line, load_onnxruntime
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.cores import available_cores
from geoengine.engine.errors import BackendError
from geoengine.engine.manifest import Variant

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

MAX_BATCH = 16
"""Pictures in one run of a graph; bounds memory. Of 1 to 128 it was the fastest on two cores for a small ViT
at 112 pixels, and within 10 % of the fastest for ViT-B/32 at 224."""


class OnnxRuntimeCpu(HostBackend):
    """Runs a bundle's graphs in ONNX Runtime on the CPU.

    Each graph is loaded when it is first needed, and shared by all threads that call `encode`.
    """

    name = ONNXRUNTIME_CPU
    runs = (Variant.int8, Variant.fp32, Variant.fp16, Variant.fp16_attention)
    """What it executes, the fastest first."""
    batch, max_batch = 2 * MAX_BATCH, MAX_BATCH

    def __init__(
        self, bundle: EngineBundle, *, precision: str | None = None, threads: int | None = None
    ) -> None:
        self.variant = choose_variant(bundle, self.name, precision, self.runs)
        self.threads = available_cores() if threads is None else threads
        self._bundle = bundle
        self._sessions = Sessions(bundle, self.name, ("CPUExecutionProvider", {}), self._configure)

    @staticmethod
    def require() -> None:
        """Raise BackendError when it cannot run on this machine, whatever the bundle."""
        load_onnxruntime()

    def close(self) -> None:
        """Free the loaded graphs; `encode` raises BackendError afterwards."""
        self._sessions.close()

    def _encode_batch(self, batch: PictureBatch) -> NDArray[np.float32]:
        tokens = self._run(batch.trunk, "tokens", batch.pixels)
        return np.concatenate(
            [
                self._run(self._head(run.encoder), "embedding", tokens[run.start : run.end])
                for run in batch.runs
            ]
        )

    def _configure(self, options: SessionOptions) -> None:
        options.intra_op_num_threads = self.threads
        # Threads that spin while they wait take the cores from tile reading and from other processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def _run(self, path: Path, output: str, value: NDArray[Any]) -> NDArray[np.float32]:
        session = self._sessions.get(path)
        try:
            (result,) = session.run([output], {session.get_inputs()[0].name: value})
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise BackendError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from error
        return np.asarray(result)
