"""A stand-in for `cuda.bindings.runtime` that computes in ordinary memory, and as late as it may.

Work on a stream is done only when somebody waits for it, or, on the streams in `eager`, at once, so that what
lacks an order gives wrong results. Every name must exist in the real module, and takes what the real function
takes.
"""

import ctypes
from collections import deque

import numpy as np
from cuda.bindings import runtime as real

from geoengine.kernels import cosine_topk

SUCCESS = real.cudaError_t.cudaSuccess
GARBAGE = 0xA5


def array_at(address, shape, dtype):
    """A view of emulated GPU memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


class Emulated:
    """CUDA with one device; `calls` has the names of all functions that were called."""

    def __init__(self, *, name=b"Emulated GPU", capability=(9, 0), driver=13020, total=8 << 30):
        self.calls = []
        self.memory = {}  # address: (size, keeper)
        self.made = {}  # handle: kind
        self.streams = {}  # handle: queue of work
        self.marks = {}  # event: (stream, ticket) of its last record
        self.reached = set()
        self.capturing = {}  # stream: work recorded
        self.free, self.total = total, total
        self.driver = driver
        self.devices = 1
        self.properties = real.cudaDeviceProp()
        self.rename(name)
        self.properties.major, self.properties.minor = capability
        self.properties.totalGlobalMem = total
        self.refuse_capture = False
        self.eager = set()
        self._handles = iter(range(0x1000, 1 << 30))
        self._checked = real.cudaGetDeviceCount()[0] != SUCCESS

    def __getattr__(self, name):
        thing = getattr(real, name)
        if isinstance(thing, type) or not callable(thing):
            return thing

        def call(*args):
            self.calls.append(name)
            if self._checked:  # without a device the real function only looks at its arguments
                thing(*args)
            return getattr(self, f"_{name}")(*args)

        return call

    def rename(self, name):
        self.properties.name = name.ljust(256, b"\0")

    # --- the device

    def _cudaGetDeviceCount(self):
        return (SUCCESS, self.devices)

    def _cudaSetDevice(self, device):
        return (SUCCESS,)

    def _cudaGetDeviceProperties(self, device):
        return (SUCCESS, self.properties)

    def _cudaDriverGetVersion(self):
        return (SUCCESS, self.driver)

    def _cudaMemGetInfo(self):
        return (SUCCESS, self.free, self.total)

    def _cudaGetErrorString(self, error):
        return real.cudaGetErrorString(error)

    def _cudaGetLastError(self):
        return (SUCCESS,)

    def _cudaDeviceSynchronize(self):
        for stream in self.streams:
            self.drain(stream)
        return (SUCCESS,)

    # --- memory

    def _cudaMalloc(self, size):
        if size > self.free:
            return (real.cudaError_t.cudaErrorMemoryAllocation, None)
        self.free -= size
        return (SUCCESS, self._reserve(size))

    def _cudaFree(self, address):
        self._cudaDeviceSynchronize()
        self._release(address)
        return (SUCCESS,)

    def _release(self, address):
        self.free += self.memory.pop(address)[0]

    def _cudaHostAlloc(self, size, flags):
        return (SUCCESS, self._reserve(size))

    def _cudaFreeHost(self, address):
        self._cudaDeviceSynchronize()
        del self.memory[address]
        return (SUCCESS,)

    def _cudaMemcpyAsync(self, target, source, size, kind, stream):
        self.check(target, size)
        self.check(source, size)
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size))
        return (SUCCESS,)

    def _reserve(self, size):
        keeper = ctypes.create_string_buffer(size + 256)
        ctypes.memset(keeper, GARBAGE, size + 256)
        address = -(-ctypes.addressof(keeper) // 256) * 256
        self.memory[address] = (size, keeper)
        return address

    def check(self, address, size):
        """The whole range must lie in one allocation."""
        assert any(
            start <= address and address + size <= start + room for start, (room, _) in self.memory.items()
        )

    # --- streams, events, graphs

    def _cudaStreamCreateWithFlags(self, flags):
        stream = next(self._handles)
        self.streams[stream] = deque()
        self.made[stream] = "stream"
        return (SUCCESS, stream)

    def _cudaStreamDestroy(self, stream):
        self.drain(stream)
        del self.streams[stream], self.made[stream]
        return (SUCCESS,)

    def _cudaStreamSynchronize(self, stream):
        assert stream not in self.capturing, "a stream that is captured cannot be waited for"
        self.drain(stream)
        return (SUCCESS,)

    def _cudaEventCreateWithFlags(self, flags):
        event = next(self._handles)
        self.made[event] = "event"
        return (SUCCESS, event)

    def _cudaEventDestroy(self, event):
        del self.made[event]
        return (SUCCESS,)

    def _cudaEventRecord(self, event, stream):
        ticket = next(self._handles)
        self.marks[event] = (stream, ticket)
        self.enqueue(stream, ticket)
        return (SUCCESS,)

    def _cudaStreamWaitEvent(self, stream, event, flags):
        if event in self.marks:
            self.enqueue(stream, lambda mark=self.marks[event]: self.drain(*mark))
        return (SUCCESS,)

    def _cudaEventSynchronize(self, event):
        if event in self.marks:
            self.drain(*self.marks[event])
        return (SUCCESS,)

    def _cudaStreamBeginCapture(self, stream, mode):
        self.capturing[stream] = []
        return (SUCCESS,)

    def _cudaStreamEndCapture(self, stream):
        work = self.capturing.pop(stream)
        if self.refuse_capture:
            return (real.cudaError_t.cudaErrorStreamCaptureInvalidated, None)
        graph = next(self._handles)
        self.made[graph] = work
        return (SUCCESS, graph)

    def _cudaGraphInstantiate(self, graph, flags):
        executable = next(self._handles)
        self.made[executable] = self.made[graph]
        return (SUCCESS, executable)

    def _cudaGraphDestroy(self, graph):
        del self.made[graph]
        return (SUCCESS,)

    def _cudaGraphExecDestroy(self, executable):
        del self.made[executable]
        return (SUCCESS,)

    def _cudaGraphLaunch(self, executable, stream):
        for work in self.made[executable]:
            self.enqueue(stream, work)
        return (SUCCESS,)

    def enqueue(self, stream, work):
        """Put work (a function, or an event's ticket) on a stream, or into what is captured from it."""
        self.capturing.get(stream, self.streams[stream]).append(work)
        if stream in self.eager and stream not in self.capturing:
            self.drain(stream)

    def drain(self, stream, until=None):
        """Do a stream's work, up to a ticket or to its end."""
        queue = self.streams[stream]
        while queue and until not in self.reached:
            work = queue.popleft()
            if callable(work):
                work()
            else:
                self.reached.add(work)


class EmulatedKernels:
    """The module `_topk_cuda` on an `Emulated`: the CPU's kernel, when the stream comes to it."""

    def __init__(self, cudart):
        self._cudart = cudart

    def allocate(self, size, device, stream):
        return self._cudart._cudaMalloc(size)[1]

    def free(self, pointer, device, stream):
        self._cudart.enqueue(stream, lambda: self._cudart._release(pointer))

    def device_of(self, pointer):
        return 0

    def workspace_bytes(self, **sizes):
        return 1000

    def topk(self, *, stream, k, m, n, d, rows_count, longest, dtype, query_dtype, normalized, **pointers):
        assert (dtype, query_dtype) == ("float32", "float32") and k <= longest

        def compute():
            table = array_at(pointers["embeddings"], (n, d), np.float32)
            photos = array_at(pointers["queries"], (m, d), np.float32)
            rows = array_at(pointers["rows"], (rows_count,), np.int64)
            segments = array_at(pointers["segments"], (m + 1,), np.int64)
            best, places = cosine_topk(table, photos, k, rows=rows, segments=segments, normalized=normalized)
            scores = array_at(pointers["scores"], (m, k), np.float32)
            indices = array_at(pointers["indices"], (m, k), np.int64)
            scores[...], indices[...] = -np.inf, -1
            scores[:, : best.shape[1]], indices[:, : best.shape[1]] = best, places

        self._cudart.enqueue(stream, compute)
