"""Arrays of any library, seen where they are: NumPy's, DLPack's, and CUDA arrays."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from geoengine.kernels import _topk_cpu

LEGACY_STREAM = 1
"""The handle of CUDA's legacy default stream, which is what no stream means."""

# DLPack's numbers for kinds of values and of devices.
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_HOSTS = {1, 3}  # the CPU, and memory of the host that CUDA has pinned
_CUDA = {2, 13}  # CUDA, and memory that CUDA manages


@runtime_checkable
class DLPackArray(Protocol):
    """An array that another library can take over by DLPack: PyTorch's, CuPy's, ONNX Runtime's."""

    def __dlpack__(self, *, stream: int | None = None) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


@runtime_checkable
class CudaArray(Protocol):
    """An array that describes itself by `__cuda_array_interface__`: CuPy's, Numba's."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]: ...


class CudaKernels(Protocol):
    """The module with the CUDA kernels: numbers, pointers and handles of streams; the host waits for none."""

    def allocate(self, size: int, device: int, stream: int, /) -> int:
        """Return memory that is there for what comes on the stream."""

    def free(self, pointer: int, device: int, stream: int, /) -> None:
        """Give memory back once what is on the stream is done."""

    def wait(self, device: int, stream: int, other: int, /) -> None:
        """Let what comes on `other` wait for what is on `stream`."""

    def device_of(self, pointer: int, /) -> int:
        """Return the device that memory belongs to."""

    def workspace_bytes(self, **sizes: object) -> int:
        """Return how much memory `topk` needs besides."""

    def topk(self, **arguments: object) -> None:
        """Put the search on a stream."""


Array: TypeAlias = npt.NDArray[Any] | DLPackArray | CudaArray


class HostTensor(NamedTuple):
    """Memory of the CPU: `array` holds it as NumPy's type `dtype`, or bfloat16's bits as uint16."""

    array: npt.NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""
        return self.array.shape

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return "the CPU"


class DeviceTensor(NamedTuple):
    """Memory of a CUDA device: `strides` count elements, `owner` keeps the memory alive."""

    pointer: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: int
    owner: object

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"CUDA device {self.device}"

    @property
    def contiguous(self) -> bool:
        """Whether elements lie in C order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


def tensor(name: str, value: object, stream: int | None = None) -> HostTensor | DeviceTensor:
    """Return where an array lies, copying nothing.

    `stream` is the CUDA stream that will read it; the array's own library makes that stream wait for what it
    still computes. Raises TypeError, naming the argument, for what is no array.
    """
    if isinstance(value, np.ndarray):
        return _of_numpy(value)
    if isinstance(value, DLPackArray):
        return _of_dlpack(name, value, LEGACY_STREAM if stream is None else stream)
    if isinstance(value, CudaArray):
        return _of_cuda_interface(value, LEGACY_STREAM if stream is None else stream)
    raise TypeError(
        f"{name} must be a NumPy array or an array with __dlpack__ or __cuda_array_interface__, "
        f"got {type(value).__name__}"
    )


def _of_numpy(array: npt.NDArray[Any]) -> HostTensor:
    # NumPy has no bfloat16 of its own; ml_dtypes, which JAX and ONNX use, registers one by this name.
    if array.dtype.name == "bfloat16":
        return HostTensor(array.view(np.uint16), "bfloat16")
    return HostTensor(array, str(array.dtype))


def _of_dlpack(name: str, value: DLPackArray, stream: int) -> HostTensor | DeviceTensor:
    kind = value.__dlpack_device__()[0]
    if kind not in _HOSTS | _CUDA:
        raise TypeError(f"{name} must be on the CPU or a CUDA device, got DLPack device type {kind}")
    capsule = value.__dlpack__() if kind in _HOSTS else value.__dlpack__(stream=stream)
    owner, pointer, shape, strides, code, bits, _, device = _topk_cpu.read_dlpack(capsule)
    dtype = f"{_KINDS.get(code, f'DLPack type {code}, ')}{bits}"
    if kind in _CUDA:
        return DeviceTensor(pointer, dtype, shape, strides, device, owner)
    size = bits // 8
    interface = {
        "data": (pointer, False),
        "shape": shape,
        "strides": tuple(stride * size for stride in strides),
        "typestr": {"bfloat16": "<u2", "bool8": "|b1"}.get(dtype) or np.dtype(dtype).str,
        "version": 3,
    }
    return HostTensor(np.asarray(_Held(interface, owner)), dtype)


def _of_cuda_interface(value: CudaArray, stream: int) -> DeviceTensor:
    interface = value.__cuda_array_interface__
    dtype = np.dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    if interface.get("strides") is None:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    else:
        strides = tuple(stride // dtype.itemsize for stride in interface["strides"])
    pointer = interface["data"][0]
    kernels = cuda_kernels()
    device = kernels.device_of(pointer)
    if interface.get("stream") not in (None, stream):
        kernels.wait(device, interface["stream"], stream)
    return DeviceTensor(pointer, str(dtype), shape, strides, device, value)


def is_on_device(value: object) -> bool:
    """Return whether an array, if it is one, lies on a CUDA device."""
    if isinstance(value, np.ndarray):
        return False
    if isinstance(value, DLPackArray):
        return value.__dlpack_device__()[0] in _CUDA
    return isinstance(value, CudaArray)


def cuda_kernels() -> CudaKernels:
    """Return the module with the CUDA kernels; raises RuntimeError where this build has none."""
    try:
        return cast(CudaKernels, importlib.import_module("geoengine.kernels._topk_cuda"))
    except ImportError as error:
        raise RuntimeError(
            "an array on a CUDA device was given, and this installation has no CUDA kernels: install from "
            f"source where nvcc is found, or move the arrays to the CPU ({error})"
        ) from error


def matrix(name: str, found: HostTensor | DeviceTensor, dtypes: tuple[str, ...]) -> tuple[int, int]:
    """Return the shape of a matrix; raises for a wrong dtype or number of dimensions."""
    if found.dtype not in dtypes:
        raise TypeError(f"{name} must be {either(dtypes)}, got {found.dtype}")
    if len(found.shape) != 2:
        raise ValueError(f"{name} must have two dimensions (rows, d), got shape {found.shape}")
    return found.shape[0], found.shape[1]


def either(names: Sequence[str]) -> str:
    """Return names in words: `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


class _Held:
    """Memory that another library owns, as NumPy likes to be told."""

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self._owner = owner
