"""Cosine top-k on a CUDA device: arrays to pointers, and answers that stay on the device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from geoengine.kernels import _topk_cpu
from geoengine.kernels.arguments import at_least_one, truth
from geoengine.kernels.int8 import FLOATS, Int8Rows
from geoengine.kernels.tensors import (
    LEGACY_STREAM,
    Array,
    CudaKernels,
    DeviceTensor,
    cuda_kernels,
    either,
    matrix,
    tensor,
)

_DLPACK_CUDA = 2
_TYPES: dict[str, tuple[str, int, int]] = {
    "float32": ("<f4", 2, 32),
    "int64": ("<i8", 0, 64),
}  # typestr; DLPack's kind and bits


class DeviceArray:
    """An answer on a CUDA device, C-contiguous; PyTorch, CuPy and others take it over without a copy.

    It is ready when what was on `stream` at the time of the call is done; a consumer that names its own
    stream is made to wait for that, and the memory is given back only when that stream is done with it.
    """

    def __init__(
        self, kernels: CudaKernels, shape: tuple[int, ...], dtype: str, device: int, stream: int
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.stream = stream
        size = max(math.prod(shape) * _TYPES[dtype][2] // 8, 1)
        self.pointer: int = kernels.allocate(size, device, stream)
        self._kernels = kernels
        self._readers: set[int] = set()
        release = weakref.finalize(self, _free, kernels, self.pointer, device, stream, self._readers)
        release.atexit = False  # the driver may be gone by then

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        return {
            "shape": self.shape,
            "typestr": _TYPES[self.dtype][0],
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CUDA, self.device

    def __dlpack__(self, *, stream: int | None = None, **newer: object) -> object:
        reader = LEGACY_STREAM if stream is None else stream
        if reader not in (-1, self.stream):  # -1: the consumer does without
            self._kernels.wait(self.device, self.stream, reader)
            self._readers.add(reader)
        kind, bits = _TYPES[self.dtype][1:]
        return _topk_cpu.make_dlpack(self, self.pointer, self.shape, kind, bits, _DLPACK_CUDA, self.device)


def cosine_topk(
    embeddings: Array | Int8Rows,
    queries: Array,
    k: int,
    rows: Array | None,
    segments: Array | None,
    normalized: bool,
    out: tuple[Array, Array] | None,
    stream: int | None,
) -> tuple[Array, Array]:
    """Put the search on `stream` and return where its answer will be, without waiting for it."""
    kernels = cuda_kernels()
    stream = LEGACY_STREAM if stream is None else stream
    call = _checked(embeddings, queries, rows, segments, stream)
    (n, d), m = call.table.shape, call.photos.shape[0]
    count = n if call.rows is None else call.rows.shape[0]
    device = call.table.device
    kept = min(at_least_one("k", k), count)
    sizes: dict[str, Any] = {
        "device": device,
        "dtype": call.table.dtype,
        "n": n,
        "d": d,
        "query_dtype": call.photos.dtype,
        "m": m,
        "rows_count": count,
        "longest": count,
        "k": kept,
        "normalized": truth("normalized", normalized),
    }
    answer, scores, indices = _answer(kernels, out, (m, kept), device, stream)
    if m == 0 or kept == 0:
        return answer
    size = kernels.workspace_bytes(
        **sizes, has_rows=call.rows is not None, has_segments=call.segments is not None
    )
    workspace = kernels.allocate(size, device, stream) if size else 0
    try:
        kernels.topk(
            **sizes,
            stream=stream,
            embeddings=call.table.pointer,
            row_stride=call.table.strides[0] if n > 1 else d,
            scales=_pointer(call.scales),
            queries=call.photos.pointer,
            rows=_pointer(call.rows),
            segments=_pointer(call.segments),
            scores=scores,
            indices=indices,
            workspace=workspace,
            workspace_bytes=size,
        )
    finally:
        if workspace:
            kernels.free(workspace, device, stream)
    return answer


class _Call(NamedTuple):
    table: DeviceTensor
    scales: DeviceTensor | None
    photos: DeviceTensor
    rows: DeviceTensor | None
    segments: DeviceTensor | None


def _checked(
    embeddings: Array | Int8Rows, queries: Array, rows: Array | None, segments: Array | None, stream: int
) -> _Call:
    quantized = isinstance(embeddings, Int8Rows)
    values = embeddings.values if isinstance(embeddings, Int8Rows) else embeddings
    table = tensor("embeddings", values, stream)
    if not isinstance(table, DeviceTensor):
        raise ValueError(f"embeddings must be on a CUDA device where a stream is given, got {table.place}")
    n, d = matrix("embeddings", table, ("int8",) if quantized else FLOATS)
    side_by_side = n == 0 or d <= 1 or table.strides[1] == 1
    if not side_by_side or (n > 1 and table.strides[0] < d):
        raise ValueError(
            "embeddings must have values side by side in a row and each row after the one before, "
            f"got shape {table.shape} with strides of {table.strides} elements"
        )
    photos = _beside(table, "queries", queries, FLOATS, stream)
    if len(photos.shape) != 2 or photos.shape[1] != d:
        raise ValueError(f"queries must be [m, {d}] like embeddings of shape {(n, d)}, got {photos.shape}")
    scales = rows_there = segments_there = None
    if isinstance(embeddings, Int8Rows):
        scales = _beside(table, "embeddings.scales", embeddings.scales, ("float32",), stream, (n,))
    if rows is not None:
        rows_there = _beside(table, "rows", rows, ("int64",), stream)
        if len(rows_there.shape) != 1:
            raise ValueError(f"rows must have one dimension, got shape {rows_there.shape}")
    if segments is not None:
        shape = (photos.shape[0] + 1,)
        segments_there = _beside(table, "segments", segments, ("int64",), stream, shape)
    return _Call(table, scales, photos, rows_there, segments_there)


def _beside(
    table: DeviceTensor,
    name: str,
    value: object,
    dtypes: tuple[str, ...],
    stream: int,
    shape: tuple[int, ...] | None = None,
) -> DeviceTensor:
    """Return a contiguous tensor on the device of the embeddings."""
    found = tensor(name, value, stream)
    if not isinstance(found, DeviceTensor) or found.device != table.device:
        raise ValueError(f"{name} must be on {table.place} like embeddings, got {found.place}")
    if found.dtype not in dtypes:
        raise TypeError(f"{name} must be {either(dtypes)} on a CUDA device, got {found.dtype}")
    if shape is not None and found.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {found.shape}")
    if not found.contiguous:
        raise ValueError(f"{name} must be C-contiguous, got strides of {found.strides} elements")
    return found


def _answer(
    kernels: CudaKernels, out: tuple[Array, Array] | None, shape: tuple[int, int], device: int, stream: int
) -> tuple[tuple[Array, Array], int, int]:
    """Return the arrays of the answer, and their pointers."""
    if out is None:
        scores = DeviceArray(kernels, shape, "float32", device, stream)
        indices = DeviceArray(kernels, shape, "int64", device, stream)
        return (scores, indices), scores.pointer, indices.pointer
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"out must be a tuple (scores, indices), got {type(out).__name__}")
    table = DeviceTensor(0, "", (), (), device, None)
    first = _beside(table, "out scores", out[0], ("float32",), stream, shape)
    second = _beside(table, "out indices", out[1], ("int64",), stream, shape)
    return out, first.pointer, second.pointer


def _pointer(found: DeviceTensor | None) -> int:
    return 0 if found is None else found.pointer


def _free(kernels: CudaKernels, pointer: int, device: int, stream: int, readers: set[int]) -> None:
    for reader in readers:
        kernels.wait(device, reader, stream)
    kernels.free(pointer, device, stream)
