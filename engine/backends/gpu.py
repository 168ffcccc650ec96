"""What the GPU backends share: pictures go in through pinned memory, embeddings stay on the GPU."""

from __future__ import annotations

import logging
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends.batches import Group, Run, picture_batches, split_rows
from geoengine.engine.backends.cuda import Cuda, DeviceArray
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError
from geoengine.engine.manifest import Variant

EncodeInto: TypeAlias = Callable[[DeviceArray, Sequence[Run], int], None]
"""(pixels uint8[n, S, S, 3] on the GPU, heads, address for float32[n, d]); enqueues on the feed's stream.

There is a trunk for side S. `pixels.room` pictures lie in memory from there on: those past n hold
anything, and may be computed too where that is faster. `pixels` lies at one of two addresses, in every call.
"""

SLOT_BYTES = 192 << 20
"""At most this much per staging buffer, of which there are two on each side: 1024 tiles of 256 pixels."""

GRAPH_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batches that run as one CUDA graph; larger ones keep the GPU busy for longer than their launches take."""

PADDED_BATCH = 32
"""Up to here a batch is padded to the next one with a graph: launches cost more than the padding."""

PREFERRED_BATCH = 256
"""Enough to keep a GPU busy; in larger ones the encoder would wait for the last tile of a level."""

_ALIGNMENT = 256

_log = logging.getLogger(__name__)


class GpuFeed:
    """Feeds an encoder on the GPU: one stream for the encoder, one for copies to it, one lock around both.

    `max_batch` is the most pictures in one call of `encode_into`. All that the feed allocates belongs to
    `cuda`, which the caller closes after the feed.
    """

    def __init__(
        self,
        cuda: Cuda,
        bundle: EngineBundle,
        variant: Variant,
        encode_into: EncodeInto,
        *,
        max_batch: int,
    ) -> None:
        self.cuda = cuda
        self.stream = cuda.stream()
        self.lock = threading.RLock()
        self.width = bundle.embed_dim
        self.buffers = _Buffers(cuda)
        self.exchange = _Exchange(cuda, self.stream)
        self.has_kernels = _has_kernels()
        self._bundle, self._variant, self._encode_into = bundle, variant, encode_into
        self._max_batch = max_batch
        self._slot_bytes = staging_bytes(bundle, variant, max_batch)
        self._staging = _Staging(cuda, self.stream, self._slot_bytes)
        self._closed = False

    def encode_mixed(self, groups: Sequence[Group]) -> list[NDArray[np.float32]]:
        """Return the embeddings of each group's pictures, float32[n, d]; see `Backend`."""
        for encoder, _ in groups:
            self._bundle.head_path(encoder, self._variant)  # raises for an unknown encoder
        counts = [len(pixels) for _, pixels in groups]
        with self.lock:
            self.check_open()
            rows = DeviceRows(self, "", sum(counts))
            rows.add(groups)
            return split_rows(rows.download(), counts)

    def rows(self, encoder: str, capacity: int) -> DeviceRows:
        """Return room on the GPU for the embeddings of `capacity` pictures of one encoder."""
        self._bundle.head_path(encoder, self._variant)  # raises for an unknown encoder
        with self.lock:
            self.check_open()
            return DeviceRows(self, encoder, capacity)

    def append(self, groups: Sequence[Group], address: int) -> None:
        """Enqueue the encoders for the groups' pictures, float32[n, d] going to `address`."""
        for batch in picture_batches(self._bundle, groups, self._variant, self._max_batch, self._slot_bytes):
            self._encode_into(self._staging.load(batch.pixels), batch.runs, address)
            self._staging.release()
            address += len(batch.pixels) * self.width * 4

    def check_open(self) -> None:
        """Raise BackendError when the feed is closed."""
        if self._closed:
            raise BackendError("the backend is closed")

    def close(self) -> None:
        """Wait for the work that is under way and take no more."""
        with self.lock:
            if not self._closed:
                self.cuda.synchronize(self.stream)
            self._closed = True


class GpuBackend(ABC):
    """A backend whose pictures come from a `GpuFeed`: what TensorRT and ONNX Runtime have in common.

    `_open` makes `_feed` and whatever else the backend needs on the GPU, `_drop` gives up what does not
    belong to `_cuda`.
    """

    _feed: GpuFeed

    def __init__(self) -> None:
        self._cuda = Cuda()
        try:
            self._open()
        except BaseException:
            self._cuda.close()
            raise

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _drop(self) -> None: ...

    def encode(self, encoder: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the unit embeddings, float32[n, d], of uint8[n, S, S, 3] pictures; see `Backend`."""
        [embeddings] = self._feed.encode_mixed([(encoder, pixels)])
        return embeddings

    def encode_mixed(self, groups: Sequence[Group]) -> list[NDArray[np.float32]]:
        """Return the embeddings of each group's pictures, float32[n, d]; see `Backend`."""
        return self._feed.encode_mixed(groups)

    def rows(self, encoder: str, capacity: int) -> DeviceRows:
        """Return room on the GPU for the embeddings of `capacity` pictures of one encoder."""
        return self._feed.rows(encoder, capacity)

    def close(self) -> None:
        """Free all that is on the GPU; every later call raises BackendError."""
        with self._feed.lock:
            self._feed.close()
            self._drop()
            self._cuda.close()


class DeviceRows:
    """The embeddings of some pictures, on the GPU; see `EmbeddingRows`."""

    def __init__(self, feed: GpuFeed, encoder: str, capacity: int) -> None:
        self._feed, self._encoder, self._capacity = feed, encoder, capacity
        self._address, size = feed.buffers.take(capacity * feed.width * 4)
        self._count = 0
        weakref.finalize(self, feed.buffers.give_back, self._address, size)

    def append(self, pixels: NDArray[np.uint8], digests: Sequence[bytes] = ()) -> None:
        """Enqueue the encoder for uint8[n, S, S, 3] pictures, whose embeddings become the next n rows."""
        del digests
        self.add([(self._encoder, pixels)])

    def add(self, groups: Sequence[Group]) -> None:
        """Enqueue the encoders for the pictures of all groups, whose embeddings become the next rows."""
        count = sum(len(pixels) for _, pixels in groups)
        if self._count + count > self._capacity:
            raise ValueError(
                f"there is room for {self._capacity} embeddings, got {self._count} and {count} more"
            )
        with self._feed.lock:
            self._feed.check_open()
            self._feed.append(groups, self._address + self._count * self._feed.width * 4)
        self._count += count

    def top_k(
        self, queries: NDArray[np.float32], k: int, rows: NDArray[np.int64], segments: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Score each query against its own rows, best first; see `EmbeddingRows`."""
        from geoengine.kernels import cosine_topk

        feed = self._feed
        if not feed.has_kernels:
            return cosine_topk(self.download(), queries, k, rows=rows, segments=segments, normalized=True)
        longest = int(np.diff(segments).max(initial=0))
        with feed.lock:
            feed.check_open()
            photos, listed, ends = feed.exchange.upload(
                np.asarray(queries, np.float32), np.asarray(rows, np.int64), np.asarray(segments, np.int64)
            )
            answer = cosine_topk(
                self._array(), photos, k, rows=listed, segments=ends, normalized=True, stream=feed.stream
            )
            best, places = feed.exchange.download(*answer)
        kept = min(k, longest)  # the GPU does not know the lists' lengths, and answers for longer ones
        return best[:, :kept], places[:, :kept]

    def download(self) -> NDArray[np.float32]:
        """Return the rows that there are, float32[n, d], in ordinary memory."""
        with self._feed.lock:
            self._feed.check_open()
            [embeddings] = self._feed.exchange.download(self._array())
        return embeddings

    def _array(self) -> DeviceArray:
        shape = (self._count, self._feed.width)
        return DeviceArray(self._address, shape, "<f4", stream=self._feed.stream)


def staging_bytes(bundle: EngineBundle, variant: Variant, max_batch: int) -> int:
    """Return the size of one staging buffer: `max_batch` of the largest pictures, if that is not too much."""
    largest = max(bundle.manifest.graphs[variant].trunks)
    picture = 3 * largest * largest
    return max(min(max_batch * picture, SLOT_BYTES), picture)


def graph_batch(count: int, room: int) -> int | None:
    """Return the batch with a CUDA graph to run `count` pictures in, or None to run them as they are."""
    if count in GRAPH_BATCHES and count <= room:
        return count
    if count > PADDED_BATCH:
        return None
    return next((batch for batch in GRAPH_BATCHES if count <= batch <= room), None)


def pictures_per_batch(bundle: EngineBundle, variant: Variant, side: int, max_batch: int) -> int:
    """Return the largest batch of pictures of `side` pixels that comes to an encoder."""
    return min(max_batch, staging_bytes(bundle, variant, max_batch) // (3 * side * side))


def _has_kernels() -> bool:
    """Tell whether this installation can score embeddings on the GPU."""
    from geoengine.kernels.tensors import cuda_kernels

    try:
        cuda_kernels()
    except RuntimeError as error:
        _log.warning("embeddings are scored on the CPU: %s", error)
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Slot:
    """One pinned buffer, the buffer on the GPU that it is copied to, and when each may be written again."""

    pinned: int
    view: NDArray[np.uint8]
    device: int
    copied: int
    consumed: int


class _Staging:
    """Two slots in turn: while the encoder reads one batch, the next is copied. Allocated when first used."""

    def __init__(self, cuda: Cuda, stream: int, size: int) -> None:
        self._cuda, self._stream, self._size = cuda, stream, size
        self._copies = cuda.stream()
        self._slots: list[_Slot] = []
        self._turn = 0

    def load(self, pixels: NDArray[np.uint8]) -> DeviceArray:
        """Bring pictures to the GPU; work on the feed's stream after this finds them there."""
        cuda = self._cuda
        if len(self._slots) < 2:
            self._slots.append(self._slot())
        slot = self._slots[self._turn]
        cuda.synchronize_event(slot.copied)  # the last copy has left the pinned buffer
        np.copyto(slot.view[: pixels.nbytes].reshape(pixels.shape), pixels)
        cuda.wait(self._copies, slot.consumed)
        cuda.upload(slot.device, slot.pinned, pixels.nbytes, self._copies)
        cuda.record(slot.copied, self._copies)
        cuda.wait(self._stream, slot.copied)
        room = self._size // pixels[0].nbytes
        return DeviceArray(slot.device, pixels.shape, "|u1", stream=self._stream, room=room)

    def release(self) -> None:
        """Let the slot be filled again once the work that is on the feed's stream now is done."""
        self._cuda.record(self._slots[self._turn].consumed, self._stream)
        self._turn = 1 - self._turn

    def _slot(self) -> _Slot:
        pinned, view = self._cuda.pinned(self._size)
        device = self._cuda.allocate(self._size, "pictures")
        return _Slot(pinned, view, device, self._cuda.event(), self._cuda.event())


class _Buffers:
    """Buffers on the GPU that are used again instead of freed, which would wait for the whole GPU.

    Safe without waiting because all users work on one stream.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._free: dict[int, list[int]] = {}

    def take(self, size: int) -> tuple[int, int]:
        """Return the address of at least `size` bytes, and how many they are."""
        rounded = _rounded(size)
        try:
            return self._free[rounded].pop(), rounded
        except (KeyError, IndexError):
            return self._cuda.allocate(rounded, "embeddings"), rounded

    def give_back(self, address: int, size: int) -> None:
        """Take a buffer back; called from finalizers, in any thread and at any time, so it takes no lock."""
        self._free.setdefault(size, []).append(address)


class _Exchange:
    """Small arrays to the GPU and back, through pinned memory that grows with the largest."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda, self._stream = cuda, stream
        self._device = self._device_size = self._pinned = 0
        self._view = np.empty(0, np.uint8)

    def upload(self, *arrays: NDArray[Any]) -> list[DeviceArray]:
        """Return the arrays on the GPU, valid until the next call, copied asynchronously.

        Nothing of an earlier call may be under way: `download` makes sure of that.
        """
        offsets, total = _places([array.nbytes for array in arrays])
        self._reserve_pinned(total)
        self._reserve_device(total)
        for offset, array in zip(offsets, arrays, strict=True):
            np.copyto(
                self._view[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape), array
            )
        self._cuda.upload(self._device, self._pinned, total, self._stream)
        return [
            DeviceArray(self._device + offset, array.shape, array.dtype.str, stream=self._stream)
            for offset, array in zip(offsets, arrays, strict=True)
        ]

    def download(self, *arrays: Any) -> list[NDArray[Any]]:  # noqa: ANN401 - with __cuda_array_interface__
        """Return contiguous arrays of the GPU in ordinary memory; waits for the stream, once."""
        faces = [array.__cuda_array_interface__ for array in arrays]
        dtypes = [np.dtype(face["typestr"]) for face in faces]
        sizes = [
            int(np.prod(face["shape"])) * dtype.itemsize for face, dtype in zip(faces, dtypes, strict=True)
        ]
        offsets, total = _places(sizes)
        if total > len(self._view):
            self._cuda.synchronize(self._stream)  # `upload` may still read the old one
            self._reserve_pinned(total)
        for face, size, offset in zip(faces, sizes, offsets, strict=True):
            if size:
                self._cuda.download(self._pinned + offset, face["data"][0], size, self._stream)
        self._cuda.synchronize(self._stream)
        return [
            self._view[offset : offset + size].view(dtype).reshape(face["shape"]).copy()
            for face, dtype, size, offset in zip(faces, dtypes, sizes, offsets, strict=True)
        ]

    def _reserve_pinned(self, size: int) -> None:
        if size > len(self._view):
            if self._pinned:
                self._cuda.free(self._pinned)
            self._pinned, self._view = self._cuda.pinned(_rounded(size))

    def _reserve_device(self, size: int) -> None:
        if size > self._device_size:
            if self._device:
                self._cuda.free(self._device)
            self._device_size = _rounded(size)
            self._device = self._cuda.allocate(self._device_size, "queries")


def _rounded(size: int) -> int:
    """Return a power of two that is at least `size`, and not tiny."""
    return 1 << max(size - 1, 1 << 16).bit_length()


def _places(sizes: list[int]) -> tuple[list[int], int]:
    """Return aligned offsets for arrays of these sizes in bytes, and the size of them all."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, total
