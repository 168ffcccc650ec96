"""What this machine can run: one finding per thing that locating a photo needs or could use."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from geoengine.engine.bundle import EngineBundle, usual_folders
from geoengine.engine.cores import available_cores
from geoengine.engine.errors import BundleError

REINSTALL = "pip install --force-reinstall --no-deps . (in the source folder of geoengine)"
_ORT_WHEELS = ("onnxruntime-gpu", "onnxruntime")
_EXPORT_PACKAGES = {
    "torch": "torch",
    "open_clip": "open_clip_torch",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "safetensors": "safetensors",
}
_CPU_FLAGS = ("avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")

# An ONNX model that copies float32[1], so that a session can be opened without the onnx package.
_IDENTITY_MODEL = (
    b'\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n'
    b"\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


class State(StrEnum):
    """How a finding is: fine, not there but not needed, or broken."""

    OK = "ok"
    ABSENT = "absent"
    BROKEN = "broken"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at; `remedy` is the command that mends it, "" when nothing needs mending."""

    topic: str
    state: State
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-ready values."""
        return asdict(self)


def examine() -> list[Finding]:
    """Look at the machine and the installation; never raises for what it finds."""
    return [
        _python(),
        _package(),
        _processor(),
        _memory(),
        _kernel(),
        _photo_formats(),
        *_onnxruntime(),
        _gpu(),
        _export_extra(),
        *_bundles(),
    ]


def findings_table(findings: Iterable[Finding], terminal: TextIO) -> str:
    """Return the findings as a table for `terminal`, and under it the commands that mend what is missing."""
    from rich.table import Table
    from rich.text import Text

    from geoengine.engine.render.table import printable, text_of

    marks = {State.OK: ("ok", "green"), State.ABSENT: ("-", "yellow"), State.BROKEN: ("broken", "bold red")}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    listed = list(findings)
    for finding in listed:
        mark, style = marks[finding.state]
        detail = Text(printable(finding.detail))
        if finding.remedy:
            detail.append(f"\n→ {finding.remedy}", style="cyan")
        table.add_row(finding.topic, Text(mark, style=style), detail)
    return text_of([table], terminal)


def _python() -> Finding:
    detail = f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}"
    return Finding(topic="Python", state=State.OK, detail=detail)


def _package() -> Finding:
    return Finding(topic="geoengine", state=State.OK, detail=version("geoengine"))


def _processor() -> Finding:
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    except OSError:
        pass  # only Linux has it
    known = " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "instruction sets unknown"
    usable, present = available_cores(), os.cpu_count() or 1
    detail = f"{name}; {usable} of {present} cores usable; {known}"
    return Finding(topic="CPU", state=State.OK, detail=detail)


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return Finding(topic="Memory", state=State.ABSENT, detail="this system does not tell")
    detail = f"{total / 2**30:.1f} GiB, of which {free / 2**30:.1f} GiB are unused"
    return Finding(topic="Memory", state=State.OK, detail=detail)


def _kernel() -> Finding:
    try:
        from geoengine.kernels import kernel_names

        detail = f"cosine top-k with {kernel_names()[0]}"
    except ImportError as error:
        return Finding(topic="Kernel", state=State.BROKEN, detail=str(error), remedy=REINSTALL)
    return Finding(topic="Kernel", state=State.OK, detail=detail)


def _photo_formats() -> Finding:
    from PIL import features

    formats = {"WebP": features.check("webp"), "AVIF": features.check("avif"), "HEIC": _heic()}
    lacking = [name for name, there in formats.items() if not there]
    if lacking:
        remedy = "pip install --upgrade --force-reinstall pillow pillow-heif"
        return Finding(
            topic="Photos", state=State.BROKEN, detail=f"cannot read {', '.join(lacking)}", remedy=remedy
        )
    return Finding(topic="Photos", state=State.OK, detail="JPEG, PNG, WebP, TIFF, AVIF, HEIC, GIF, BMP")


def _heic() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    return bool(pillow_heif.libheif_version())


def _onnxruntime() -> list[Finding]:
    wheels = [wheel for wheel in _ORT_WHEELS if _version(wheel)]
    remedy = f"pip uninstall -y {' '.join(_ORT_WHEELS)} && pip install {(*wheels, *_ORT_WHEELS)[0]}"
    if len(wheels) > 1:
        detail = f"{' and '.join(wheels)} are both installed, and overwrite each other's files"
        return [Finding(topic="ONNX Runtime", state=State.BROKEN, detail=detail, remedy=remedy)]
    try:
        import onnxruntime
    except Exception as error:  # a broken wheel fails in many ways
        detail = f"cannot be imported: {error}"
        return [Finding(topic="ONNX Runtime", state=State.BROKEN, detail=detail, remedy=remedy)]
    problem = _provider_problem(onnxruntime, "CPUExecutionProvider")
    detail = f"{onnxruntime.__version__}, on the CPU: {problem or 'a session runs'}"
    if problem is not None:
        return [Finding(topic="ONNX Runtime", state=State.BROKEN, detail=detail, remedy=remedy)]
    cpu = Finding(topic="ONNX Runtime", state=State.OK, detail=detail)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return [cpu]
    problem = _provider_problem(onnxruntime, "CUDAExecutionProvider")
    if problem is None:
        return [cpu, Finding(topic="ORT CUDA", state=State.OK, detail="a session runs on the GPU")]
    # Without a GPU that is as it should be, and the finding about the GPU says so.
    remedy = "pip install 'geoengine[gpu]'" if _cuda_devices() else ""
    return [cpu, Finding(topic="ORT CUDA", state=State.ABSENT, detail=problem, remedy=remedy)]


def _provider_problem(onnxruntime: Any, provider: str) -> str | None:  # noqa: ANN401 - the module
    """Return why a session does not run with the provider, or None when it does."""
    import numpy as np

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the native library would write its own lines to stderr
    options.intra_op_num_threads = 1
    onnxruntime.set_default_logger_severity(4)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # With its fall-back to the CPU, onnxruntime prints what fails to stdout.
            session = onnxruntime.InferenceSession(
                _IDENTITY_MODEL, options, providers=[provider], enable_fallback=0
            )
        [copied] = session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # onnxruntime has its own exception for each failure
        return str(error).strip().splitlines()[0]
    finally:
        onnxruntime.set_default_logger_severity(2)
    if provider not in session.get_providers():
        return f"the wheel has {provider}, but it cannot be loaded here"
    return None if copied[0] == 1 else "a session gives wrong numbers"


def _gpu() -> Finding:
    devices = _cuda_devices()
    if not devices:
        detail = "no NVIDIA GPU with a working driver; the CPU is used"
        return Finding(topic="GPU", state=State.ABSENT, detail=detail)
    driver = _driver_version()
    detail = "; ".join(devices) + (f"; driver {driver}" if driver else "")
    return Finding(topic="GPU", state=State.OK, detail=detail)


def _cuda_devices() -> list[str]:
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


def _export_extra() -> Finding:
    there = {p: _version(p) for module, p in _EXPORT_PACKAGES.items() if importlib.util.find_spec(module)}
    lacking = [package for package in _EXPORT_PACKAGES.values() if package not in there]
    if lacking:
        return Finding(
            topic="Export extra",
            state=State.ABSENT,
            detail=f"{', '.join(lacking)} not installed; only building engines needs the extra",
            remedy="pip install 'geoengine[export]'",
        )
    versions = ", ".join(f"{package} {number or '(unknown version)'}" for package, number in there.items())
    return Finding(topic="Export extra", state=State.OK, detail=versions)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _bundles() -> list[Finding]:
    here, data = usual_folders()
    earth = [_bundle(f"Bundle {folder}", folder, "") for folder in (here, data) if folder.is_dir()]
    if not earth:
        detail = f"none in ./{here} nor in {data}; needed for photos of Earth"
        earth = [
            Finding(
                topic="Earth bundle",
                state=State.ABSENT,
                detail=detail,
                remedy=f"geoengine build-engines --out {here}/",
            )
        ]
    return [_bundle("Demo bundle", "planet", REINSTALL), *earth]


def _bundle(topic: str, path: str | Path, remedy: str) -> Finding:
    try:
        bundle = EngineBundle.open(path)
    except BundleError as error:
        fix = remedy or f"geoengine build-engines --out {path}"
        return Finding(topic=topic, state=State.BROKEN, detail=str(error), remedy=fix)
    manifest = bundle.manifest
    zooms = ", ".join(map(str, bundle.levels))
    detail = f"{manifest.model}/{manifest.pretrained}, world {bundle.world}, levels {zooms}; checksums agree"
    return Finding(topic=topic, state=State.OK, detail=detail)
