"""The OpenVINO backend: int8 graphs on CPUs with instructions for them."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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

_UnderWay: TypeAlias = "tuple[Path, InferRequest]"

MAX_BATCH = 16
"""Pictures in one run of a graph; bounds memory. Of 8 to 32 it was the fastest on two cores for ViT-B/32."""


class OpenVino(HostBackend):
    """Runs a bundle's int8 graphs in OpenVINO on the CPU.

    One batch is under way at a time, whichever thread called `encode`. It is shared out among as many streams
    as there are threads, which run trunk and heads without waiting for each other. Where there are fewer
    pictures than threads, one stream has them all, unless the trunk is there for several already. Graphs are
    compiled when they are first needed.
    """

    name, runs = OPENVINO, (Variant.int8,)

    def __init__(
        self, bundle: EngineBundle, *, precision: str | None = None, threads: int | None = None
    ) -> None:
        self.variant = choose_variant(bundle, self.name, precision, self.runs)
        self.threads = available_cores() if threads is None else threads
        self.batch = self.max_batch = MAX_BATCH * self.threads
        self._bundle = bundle
        self._requests: dict[tuple[Path, int], list[InferRequest]] = {}  # by graph and number of streams
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
        with self._lock:
            if self._closed:
                raise BackendError(f"backend {self.name} is closed")
            many = len(batch.pixels) >= self.threads or (batch.trunk, self.threads) in self._requests
            streams = self.threads if many else 1
            heads = (self._head(run.encoder) for run in batch.runs)
            graphs = {path: self._loaded(path, streams) for path in (batch.trunk, *heads)}
            self._take_turns(
                self._steps(share, {path: own[stream] for path, own in graphs.items()}, embeddings[rows])
                for stream, (rows, share) in enumerate(batch.shares(min(streams, len(batch.pixels))))
            )
        return embeddings

    def _steps(
        self, batch: PictureBatch, graphs: Mapping[Path, InferRequest], embeddings: NDArray[np.float32]
    ) -> Iterator[_UnderWay]:
        """Encode a batch with a stream's own requests; yields each that is under way, and goes on after it.

        Results lie in the requests' memory until they run again.
        """
        trunk = graphs[batch.trunk]
        self._start(batch.trunk, trunk, np.ascontiguousarray(batch.pixels))
        yield batch.trunk, trunk
        tokens = trunk.get_output_tensor(0).data
        for run in batch.runs:
            path, own = self._head(run.encoder), slice(run.start, run.end)
            self._start(path, graphs[path], tokens[own])
            yield path, graphs[path]
            embeddings[own] = graphs[path].get_output_tensor(0).data

    def _start(self, path: Path, request: InferRequest, value: NDArray[Any]) -> None:
        """Have a graph run on `value`, which must stay as it is until `_wait` returns."""
        try:
            request.start_async([value], share_inputs=True)
        except RuntimeError as error:
            raise _failed(path, error) from error

    def _wait(self, path: Path, request: InferRequest) -> None:
        try:
            request.wait()
        except RuntimeError as error:
            raise _failed(path, error) from error

    def _take_turns(self, streams: Iterable[Iterator[_UnderWay]]) -> None:
        """Run streams side by side until all have ended.

        One thread starts all requests: where several convert their inputs at once, OpenVINO's bindings can
        wait for each other without end.
        """
        under_way: deque[tuple[_UnderWay, Iterator[_UnderWay]]] = deque()
        try:
            for steps in streams:
                under_way.append((next(steps), steps))
            while under_way:
                (path, request), steps = under_way[0]
                self._wait(path, request)
                step = next(steps, None)
                under_way.popleft()
                if step is not None:
                    under_way.append((step, steps))
        finally:
            for (_, request), _ in under_way:  # after an error or Ctrl-C: they are at work on our memory
                with contextlib.suppress(RuntimeError):
                    request.wait()

    def _loaded(self, path: Path, streams: int) -> list[InferRequest]:
        """Return a graph's requests, one for each stream."""
        if (path, streams) not in self._requests:
            requests = self._load(path, streams)
            self._bundle.check_unchanged()
            self._requests[path, streams] = requests
        return self._requests[path, streams]

    def _load(self, path: Path, streams: int) -> list[InferRequest]:
        options = {
            # By default it is bfloat16 where the CPU has it, and then embeddings differ between machines.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": streams,
            # Pinned threads of two processes, or of two graphs, would wait for the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            compiled = self._core.compile_model(path, "CPU", options)
            return [compiled.create_infer_request() for _ in range(streams)]
        except RuntimeError as error:
            self._bundle.check_unchanged()
            raise BackendError(f"OpenVINO cannot load {path}: {first_line(error)}") from error


def _failed(path: Path, error: RuntimeError) -> BackendError:
    return BackendError(f"OpenVINO cannot run {path}: {first_line(error)}")


def _load_openvino() -> Any:  # noqa: ANN401 - the module
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"OpenVINO cannot be loaded ({error}): pip install 'geoengine[openvino]'"
        ) from error
    return openvino
