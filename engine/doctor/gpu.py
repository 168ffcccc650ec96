"""NVIDIA GPUs, their driver, and the libraries that compute on them."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from geoengine.engine.doctor.finding import Finding, State, installed_version

_CUDNN = "cudnn64_9.dll" if os.name == "nt" else "libcudnn.so.9"


def findings() -> list[Finding]:
    """Describe the GPU, CUDA, cuDNN and TensorRT; without a GPU the libraries are not needed."""
    found = _gpu()
    if found.state is not State.OK:
        return [found]
    return [found, _cuda(), _cudnn(), _tensorrt()]


def _gpu() -> Finding:
    devices = cuda_devices()
    if not devices:
        detail = "no NVIDIA GPU with a working driver; the CPU is used"
        return Finding(topic="GPU", state=State.ABSENT, detail=detail)
    driver = _driver_version()
    detail = "; ".join(devices) + (f"; driver {driver}" if driver else "")
    return Finding(topic="GPU", state=State.OK, detail=detail)


def _cuda() -> Finding:
    """Ask the runtime library that our own code calls."""
    try:
        from cuda.bindings import runtime

        error, number = runtime.cudaRuntimeGetVersion()
    except (ImportError, RuntimeError) as problem:
        return _absent("CUDA", f"cuda-bindings: {problem}", "gpu")
    if error != runtime.cudaError_t.cudaSuccess:
        return _absent("CUDA", f"the runtime library says {error.name}", "gpu")
    detail = (
        f"runtime {number // 1000}.{number % 1000 // 10}, cuda-bindings {installed_version('cuda-bindings')}"
    )
    return Finding(topic="CUDA", state=State.OK, detail=detail)


def _cudnn() -> Finding:
    """Load cuDNN as ONNX Runtime does: from NVIDIA's wheel, else from the system."""
    folders = [Path(entry) / "nvidia" / "cudnn" / "lib" for entry in sys.path]
    names = [*(str(folder / _CUDNN) for folder in folders if (folder / _CUDNN).is_file()), _CUDNN]
    try:
        library = ctypes.CDLL(names[0])
        library.cudnnGetVersion.restype = ctypes.c_size_t
        number = library.cudnnGetVersion()
    except (OSError, AttributeError) as problem:
        return _absent("cuDNN", str(problem), "gpu")
    return Finding(topic="cuDNN", state=State.OK, detail=f"{number // 10000}.{number % 10000 // 100}")


def _tensorrt() -> Finding:
    """Start a builder, which loads all of TensorRT."""
    try:
        import tensorrt

        tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
    except Exception as problem:  # a library that is missing shows in many ways
        return _absent("TensorRT", str(problem).partition("\n")[0] or type(problem).__name__, "tensorrt")
    return Finding(topic="TensorRT", state=State.OK, detail=f"{tensorrt.__version__}: a builder starts")


def _absent(topic: str, problem: str, extra: str) -> Finding:
    remedy = f"pip install 'geoengine[{extra}]'"
    return Finding(topic=topic, state=State.ABSENT, detail=problem, remedy=remedy)


def cuda_devices() -> list[str]:
    """Return one description per GPU that the driver knows, asking the driver library itself."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        if cuda.cuInit(0) != 0:
            return []
        count = ctypes.c_int()
        cuda.cuDeviceGetCount(ctypes.byref(count))
        return [_cuda_device(cuda, index) for index in range(count.value)]
    except (OSError, AttributeError):  # no driver, or one too old to have these functions
        return []


def _cuda_device(cuda: ctypes.CDLL, index: int) -> str:
    name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # …_MINOR
    capability = f"compute capability {major.value}.{minor.value}"
    return f"{name.value.decode(errors='replace')}, {size.value / 2**30:.0f} GiB, {capability}"


def _driver_version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((word for word in text.split() if word[0].isdigit() and "." in word), "")
