"""ONNX Runtime sessions, one per graph of a bundle."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions


class Sessions:
    """Sessions of a bundle's graphs, loaded when they are first asked for, and shared by all threads.

    `name` is the backend's, for errors; `provider` is ONNX Runtime's execution provider with its options,
    `configure` sets further options of a session.
    """

    def __init__(
        self,
        bundle: EngineBundle,
        name: str,
        provider: tuple[str, dict[str, str]],
        configure: Callable[[SessionOptions], None],
    ) -> None:
        self._bundle = bundle
        self._name, self._provider, self._configure = name, provider, configure
        self._loaded: dict[Path, InferenceSession] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.onnxruntime = load_onnxruntime()

    def get(self, path: Path) -> InferenceSession:
        """Return the session of a graph; raises BackendError when it cannot be loaded, or after `close`.

        Raises BundleError when the bundle has been replaced.
        """
        with self._lock:
            if self._closed:
                raise BackendError(f"backend {self._name} is closed")
            if path not in self._loaded:
                session = self._load(path)
                self._bundle.check_unchanged()
                self._loaded[path] = session
            return self._loaded[path]

    def paths(self) -> set[Path]:
        """Return the graphs that are loaded."""
        return set(self._loaded)

    def close(self) -> None:
        """Drop all sessions; `get` raises BackendError afterwards."""
        with self._lock:
            self._closed = True
            self._loaded.clear()

    def _load(self, path: Path) -> InferenceSession:
        ort = self.onnxruntime
        options = ort.SessionOptions()
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors; the rest is about machines and graphs that work all the same
        self._configure(options)
        try:
            session = ort.InferenceSession(
                path,
                options,
                providers=[self._provider],
                # Crashes the process on Transpose -> Cast -> MatMul with fp16 weights (ONNX Runtime 1.31).
                # Its blocked layout is for convolutions, of which these graphs have none.
                disabled_optimizers=["NchwcTransformer"],
                # Falling back to another provider would go unnoticed.
                enable_fallback=0,
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            self._bundle.check_unchanged()
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot load {path}: {first_line(error)}"
            ) from error
        provider, _ = self._provider
        if session.get_providers()[0] != provider:  # it goes on without one that does not load
            raise BackendError(
                f"ONNX Runtime {ort.__version__} has {provider}, but it cannot be loaded here: "
                "see `geoengine doctor`"
            )
        return session


def load_onnxruntime() -> Any:  # noqa: ANN401 - the module, which has no types
    """Return the onnxruntime module; raises BackendError with the remedy when it cannot be imported.

    From 1.29 on, its official wheels report to their maker which models are loaded and how they run, unless
    the environment says otherwise before the import; so it does here, if the user has not set the variable.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be loaded ({error}): pip install onnxruntime") from error
    return onnxruntime


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
