"""What executes an encoder: the backends, and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError
from geoengine.engine.manifest import Variant, precision_of

TENSORRT = "tensorrt"
ONNXRUNTIME_CUDA = "onnxruntime-cuda"
OPENVINO = "openvino"
ONNXRUNTIME_CPU = "onnxruntime-cpu"

_CLASSES = {
    TENSORRT: ("tensorrt", "TensorRt"),
    ONNXRUNTIME_CUDA: ("onnxruntime_cuda", "OnnxRuntimeCuda"),
    OPENVINO: ("openvino", "OpenVino"),
    ONNXRUNTIME_CPU: ("onnxruntime", "OnnxRuntimeCpu"),
}
BACKENDS = tuple(_CLASSES)
"""Names that `open_backend` takes besides "auto", the fastest first."""

GPU_BACKENDS = (TENSORRT, ONNXRUNTIME_CUDA)
"""Those that run on a GPU."""

MAX_THREADS = 512
"""More would only exhaust the system: every graph of a bundle has threads of its own."""

_log = logging.getLogger(__name__)


class EmbeddingRows(Protocol):
    """The embeddings of some pictures, kept where the encoder runs until they have been scored."""

    def append(self, pixels: NDArray[np.uint8], digests: Sequence[bytes] = ()) -> None:
        """Encode uint8[n, S, S, 3] and keep the embeddings as the next n rows.

        It may return before the encoder is done; `pixels` may be overwritten at once. `digests`, one for each
        picture or none, are equal for equal pictures: who encodes for many callers may know some already.
        Raises BackendError when the encoder cannot run.
        """
        ...

    def download(self) -> NDArray[np.float32]:
        """Return the rows that there are, float32[n, d], in ordinary memory; d may be 0 while n is."""
        ...

    def top_k(
        self, queries: NDArray[np.float32], k: int, rows: NDArray[np.int64], segments: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Score query i, float32[m, d], against its own rows: `rows[segments[i]:segments[i + 1]]`.

        Returns scores float32[m, k'] and indices int64[m, k'], positions in the query's list, as
        `cosine_topk` does.
        """
        ...


class Backend(Protocol):
    """Runs the encoders of one bundle; it may be called from several threads at once."""

    @property
    def name(self) -> str:
        """What executes, for people and logs: one of `BACKENDS`."""
        ...

    @property
    def variant(self) -> Variant:
        """Which of the bundle's graphs are executed."""
        ...

    @property
    def batch(self) -> int:
        """How many pictures in one call suit it best."""
        ...

    @property
    def max_batch(self) -> int:
        """The most pictures that a graph ever runs at once; larger calls are split."""
        ...

    def encode(self, encoder: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the unit embeddings, float32[n, d], of uint8[n, S, S, 3] RGB pictures; n may be 0.

        `encoder` is "photo" or a map encoder, "z04" and so on; BundleError when the bundle does not have it.
        An embedding does not depend on what else is in the call: alone or among others, every component
        agrees to 1e-6 on a CPU, and to the rounding of its precision on a GPU. `pixels` is read only during
        the call. Raises BackendError when the encoder cannot run, BundleError when it was not loaded yet and
        the bundle has been replaced since it was opened.
        """
        ...

    def encode_mixed(self, groups: Sequence[tuple[str, NDArray[np.uint8]]]) -> list[NDArray[np.float32]]:
        """Return what `encode` gives for each group, an encoder and its pictures, of which there may be many.

        Pictures of equal sides share runs of the trunk, whatever their encoders.
        """
        ...

    def rows(self, encoder: str, capacity: int) -> EmbeddingRows:
        """Return room for the embeddings of `capacity` pictures of one encoder."""
        ...

    def close(self) -> None:
        """Free what the backend holds; it cannot be used afterwards."""
        ...


def open_backend(
    bundle: EngineBundle,
    *,
    backend: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
) -> Backend:
    """Return the named backend for a bundle; "auto" takes the first of `BACKENDS` that runs, and logs which.

    `precision` is a `Variant`, by default the fastest that the bundle has for the backend. `threads`
    is the number of CPU threads, by default the cores that this process may use. Raises BackendError when
    backend or precision is unknown or cannot run here; nothing else is ever taken in place of what was named.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise BackendError(f"threads must be from 1 to {MAX_THREADS}, got {threads}")
    check_choice(backend, precision)
    if backend != "auto":
        return _open(backend, bundle, precision, threads)
    reasons = []
    for name, opened in try_backends(bundle, precision=precision, threads=threads):
        if not isinstance(opened, BackendError):
            _log.info("backend %s, %s", opened.name, opened.variant)
            return opened
        _log.debug("not backend %s: %s", name, opened)
        reasons.append(f"{name}: {opened}")
    raise BackendError(f"no backend can run engine bundle {bundle.path}: {'; '.join(reasons)}")


def check_choice(backend: str, precision: str | None) -> None:
    """Raise BackendError unless there are such a backend, or "auto", and such a precision, or None."""
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"unknown backend {backend!r}: there are auto, {', '.join(BACKENDS)}")
    if precision not in (None, *Variant):
        raise BackendError(f"unknown precision {precision!r}: there are {', '.join(Variant)}")


def try_backends(
    bundle: EngineBundle, *, precision: str | None = None, threads: int | None = None
) -> Iterator[tuple[str, Backend | BackendError]]:
    """Yield each backend's name and the opened backend, or why it cannot run; the caller closes them."""
    for name in BACKENDS:
        try:
            yield name, _open(name, bundle, precision, threads)
        except BackendError as error:
            yield name, error


def require_backend(name: str, variants: Sequence[Variant]) -> None:
    """Raise BackendError when a backend runs none of the variants, or cannot run here whatever the bundle."""
    backend = _class(name)
    if not set(variants) & set(backend.runs):
        raise BackendError(_not_computed(name, ", ".join(variants), backend.runs))
    backend.require()


def _open(name: str, bundle: EngineBundle, precision: str | None, threads: int | None) -> Backend:
    backend: Backend = _class(name)(bundle, precision=precision, threads=threads)
    return backend


def _class(name: str) -> Any:  # noqa: ANN401 - a class that makes backends
    module, cls = _CLASSES[name]
    return getattr(import_module(f"geoengine.engine.backends.{module}"), cls)


def _not_computed(name: str, precision: str, runs: Sequence[Variant]) -> str:
    return f"backend {name} does not compute in {precision}, only in {', '.join(runs)}"


def choose_variant(
    bundle: EngineBundle, name: str, precision: str | None, runs: tuple[Variant, ...]
) -> Variant:
    """Return the variant that a backend executes: `precision`, or the first of `runs` that the bundle has.

    `name` is the backend's, `runs` what it can execute. A variant that measured faster on this backend when
    the bundle was built goes first. Raises BackendError, with the command that mends it, when there is none.
    """
    preferred = bundle.manifest.preferred.get(name)
    ordered = sorted(runs, key=lambda variant: variant != preferred)
    wanted = [variant for variant in ordered if precision in (None, variant)]
    for variant in wanted:
        if variant in bundle.variants:
            return variant
    if not wanted:
        raise BackendError(_not_computed(name, str(precision), runs))
    raise BackendError(
        f"engine bundle {bundle.path} has no {' or '.join(wanted)} graphs, which backend {name} needs: "
        f"`geoengine build-engines --precision {precision_of(wanted[0])}` makes them"
    )
