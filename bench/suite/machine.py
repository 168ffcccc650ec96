"""The machine that figures were measured on, and what they were measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from geoengine.engine.cores import available_cores

PACKAGES = (
    "geoengine",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "opencv-python-headless",
    "tensorrt-cu13",
    "torch",
    "open_clip_torch",
    "fastembed",
    "faiss-cpu",
    "usearch",
)
"""Packages whose versions a figure may depend on."""

_CODE = ("py", "cpp", "hpp", "cu", "cuh")
_PATIENCE_S = 30.0  # with other programs


def describe() -> dict[str, Any]:
    """Return the machine, its load and the versions in use, JSON-ready; `name` is that of its folder."""
    gpu, driver = _gpu()
    return {
        "name": folder_name(gpu or processor(), None if gpu else available_cores()),
        "cpu": processor(),
        "cores": available_cores(),
        "gpu": gpu,
        "driver": driver,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "load": round(os.getloadavg()[0], 2),
    }


def folder_name(device: str, cores: int | None) -> str:
    """Return the name of the folder for a device's results, such as amd-epyc-2-cores."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return name if cores is None else f"{name}-{cores}-cores"


def processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # only Linux has it
    return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Return the name of the first NVIDIA GPU, None without one."""
    return _gpu()[0]


def _gpu() -> tuple[str | None, str | None]:
    """Return the name of the first NVIDIA GPU and the version of its driver."""
    told = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if not told:
        return None, None
    name, _, driver = told.splitlines()[0].rpartition(",")
    return (name.strip(), driver.strip()) if name else (None, None)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Return the commit of the source tree that this file is of, None for an installed package.

    "+changes" follows when code differs from the commit. GEOENGINE_COMMIT tells it where a build for
    measuring has left its source tree.
    """
    here = Path(__file__).resolve()
    # A package may be installed inside the source tree of something else, whose commit says nothing.
    if _output("git", "-C", str(here.parent), "ls-files", here.name) is None:
        return os.environ.get("GEOENGINE_COMMIT", "").strip() or None
    commit = _output("git", "-C", str(here.parent), "rev-parse", "--short=10", "HEAD")
    code = [f":(top)*.{ending}" for ending in _CODE]
    changed = _output("git", "-C", str(here.parent), "diff", "--name-only", "HEAD", "--", *code)
    return f"{commit}+changes" if commit and changed else commit


def _output(*command: str) -> str | None:
    """Return what a program printed, None when it is not there, fails, hangs or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
