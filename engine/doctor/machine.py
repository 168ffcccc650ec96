"""The machine and the package itself."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from geoengine.engine.cores import available_cores
from geoengine.engine.doctor.finding import REINSTALL, Finding, State

_CPU_FLAGS = ("avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def findings() -> list[Finding]:
    """Describe Python, the package, the processor, the memory, and what the package compiled or brings."""
    return [_python(), _package(), _processor(), _memory(), _kernel(), _photo_formats()]


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
