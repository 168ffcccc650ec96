"""What executes an encoder."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError

ONNXRUNTIME_CPU = "onnxruntime-cpu"
BACKENDS = (ONNXRUNTIME_CPU,)
"""Names that `open_backend` takes besides "auto"."""

MAX_THREADS = 512
"""More would only exhaust the system: every graph of a bundle has threads of its own."""

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """Runs the encoders of one bundle; `encode` may be called from several threads at once."""

    @property
    def name(self) -> str:
        """What executes, for people and logs: one of `BACKENDS`."""
        ...

    def encode(self, encoder: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the unit embeddings, float32[n, d], of uint8[n, S, S, 3] RGB pictures; n may be 0.

        `encoder` is "photo" or a map encoder, "z04" and so on; BundleError when the bundle does not have it.
        An embedding does not depend on what else is in the call: alone or among others, every component
        agrees to 1e-6. `pixels` is read only during the call. Raises BackendError when the encoder cannot
        run.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; it cannot be used afterwards."""
        ...


def open_backend(bundle: EngineBundle, *, backend: str = "auto", threads: int | None = None) -> Backend:
    """Return the named backend for a bundle; "auto" takes the best one that can run here, and logs which.

    `threads` is the number of CPU threads, by default the cores that this process may use. Raises
    BackendError when the backend is unknown or cannot run here; nothing else is ever taken in its place.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise BackendError(f"threads must be from 1 to {MAX_THREADS}, got {threads}")
    if backend not in ("auto", *BACKENDS):
        known = ", ".join(BACKENDS)
        raise BackendError(f"unknown backend {backend!r}: this version has auto and {known}")
    from geoengine.engine.backends.onnxruntime import OnnxRuntimeCpu

    opened = OnnxRuntimeCpu(bundle, threads=threads)
    if backend == "auto":
        _log.info("backend %s, %d threads", opened.name, opened.threads)
    return opened
