"""What the GPU backends need of CUDA: memory, copies, streams, events, graphs; thin over cuda-bindings."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsInt

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.errors import BackendError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """A GPU: its name, compute capability ("9.0"), its driver's CUDA version ("13.0"), its memory."""

    name: str
    compute_capability: str
    driver: str
    total_bytes: int


class DeviceArray:
    """Memory on the GPU as an array in C order; CuPy, PyTorch, Numba and our kernels take it without a copy.

    `room` is how many rows the memory behind it holds, at least `shape[0]`.
    """

    def __init__(
        self, address: int, shape: Sequence[int], typestr: str, *, stream: int, room: int | None = None
    ) -> None:
        self.address = address
        self.shape = tuple(shape)
        self.typestr = typestr
        self.room = self.shape[0] if room is None else room
        self.__cuda_array_interface__ = {
            "shape": self.shape,
            "typestr": typestr,
            "data": (address, False),
            "strides": None,
            "version": 3,
            "stream": stream,
        }


class Cuda:
    """The first CUDA device, which CUDA_VISIBLE_DEVICES chooses, and all that was made on it.

    Handles and addresses are integers. Raises BackendError, with the remedy, when cuda-bindings, a driver or
    a GPU is missing; every method raises it when CUDA reports an error.
    """

    def __init__(self) -> None:
        self._runtime = cuda_runtime()
        self.info = gpu_info()
        self._call("cudaSetDevice", 0)
        self._made: dict[int, str] = {}  # handle or address -> the function that frees it

    def free_bytes(self) -> int:
        """Return how much of the GPU's memory nobody uses."""
        free, _ = self._call("cudaMemGetInfo")
        return int(free)

    def allocate(self, size: int, purpose: str) -> int:
        """Return the address of `size` bytes on the GPU; `purpose` completes "no room for" in the error."""
        error, address = self._runtime.cudaMalloc(max(size, 1))
        if error == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            self._runtime.cudaGetLastError()  # so that the next call does not report it again
            raise BackendError(
                f"{self.info.name} has no room for {purpose}: {mib(size)} are needed and "
                f"{mib(self.free_bytes())} are free; close what else uses the GPU, or build with a smaller "
                "--max-batch"
            )
        self._check(error, "cudaMalloc")
        return self._own(address, "cudaFree")

    def pinned(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Return the address of `size` bytes that the GPU copies from and to directly, and a view of them."""
        address = self._own(
            self._call("cudaHostAlloc", size, self._runtime.cudaHostAllocDefault), "cudaFreeHost"
        )
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def stream(self) -> int:
        """Return a new stream that does not wait for the default one."""
        flags = self._runtime.cudaStreamNonBlocking
        return self._own(self._call("cudaStreamCreateWithFlags", flags), "cudaStreamDestroy")

    def event(self) -> int:
        """Return a new event."""
        flags = self._runtime.cudaEventDisableTiming
        return self._own(self._call("cudaEventCreateWithFlags", flags), "cudaEventDestroy")

    def free(self, made: int) -> None:
        """Free what one of the methods above, or `capture`, returned."""
        self._call(self._made.pop(made), made)

    def close(self) -> None:
        """Free everything; what still runs is waited for."""
        self._call("cudaDeviceSynchronize")
        while self._made:
            made, function = self._made.popitem()
            try:
                self._call(function, made)
            except BackendError as error:
                _log.warning("%s", error)  # the rest must be freed all the same

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy pinned memory to the GPU, asynchronously."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from the GPU to pinned memory, asynchronously."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def move(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy within the GPU, asynchronously."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def record(self, event: int, stream: int) -> None:
        """Let the event stand for all work that is on the stream now."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Let later work on the stream wait for the event; one never recorded is not waited for."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: int) -> None:
        """Wait, on the CPU, for the event."""
        self._call("cudaEventSynchronize", event)

    def synchronize(self, stream: int) -> None:
        """Wait, on the CPU, for all work on the stream."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Return a graph of what `enqueue` puts on the stream, without running it.

        Raises BackendError when something in it cannot be captured; the stream is usable afterwards.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            error, graph = self._runtime.cudaStreamEndCapture(stream)
            if error == self._runtime.cudaError_t.cudaSuccess:
                self._call("cudaGraphDestroy", graph)
            self._runtime.cudaGetLastError()
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._own(self._call("cudaGraphInstantiate", graph, 0), "cudaGraphExecDestroy")
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Run a captured graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def _own(self, made: SupportsInt, free: str) -> int:
        handle = int(made)
        self._made[handle] = free
        return handle

    def _call(self, function: str, *arguments: object) -> Any:  # noqa: ANN401 - as the function returns
        error, *results = getattr(self._runtime, function)(*arguments)
        self._check(error, function)
        return results[0] if len(results) == 1 else results

    def _check(self, error: object, function: str) -> None:
        if error != self._runtime.cudaError_t.cudaSuccess:
            self._runtime.cudaGetLastError()
            raise BackendError(
                f"CUDA's {function} failed on {self.info.name}: {_words(self._runtime, error)}"
            )


def cuda_runtime() -> Any:  # noqa: ANN401 - the module, which has no types
    """Return `cuda.bindings.runtime`; raises BackendError with the remedy when it cannot be loaded."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(f"cuda-bindings cannot be loaded ({error}): pip install cuda-bindings") from error
    return runtime


def gpu_info() -> GpuInfo:
    """Describe the first CUDA device, leaving its memory alone; raises BackendError when there is none."""
    runtime = cuda_runtime()
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess or not count:
        reason = _words(runtime, error) if error != runtime.cudaError_t.cudaSuccess else "no device"
        raise BackendError(
            f"no NVIDIA GPU with a working driver ({reason}): install NVIDIA's driver, or use a CPU backend"
        )
    error, device = runtime.cudaGetDeviceProperties(0)
    if error != runtime.cudaError_t.cudaSuccess:
        raise BackendError(f"the GPU does not answer ({_words(runtime, error)}): see `nvidia-smi`")
    _, version = runtime.cudaDriverGetVersion()  # 13020 is 13.2
    return GpuInfo(
        name=device.name.split(b"\0")[0].decode(errors="replace"),
        compute_capability=f"{device.major}.{device.minor}",
        driver=f"{version // 1000}.{version % 1000 // 10}",
        total_bytes=int(device.totalGlobalMem),
    )


def _words(runtime: Any, error: object) -> str:  # noqa: ANN401 - the module
    _, text = runtime.cudaGetErrorString(error)
    return str(text.decode(errors="replace"))


def mib(size: int) -> str:
    """Return a size in bytes for people, in MiB."""
    return f"{size / 2**20:.0f} MiB"
