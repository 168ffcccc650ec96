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


def describe() -> dict[str, Any]:
    """Return the machine, its load and the versions in use, JSON-ready; `name` is that of its folder."""
    gpu = gpu_name()
    return {
        "name": folder_name(gpu or processor(), None if gpu else available_cores()),
        "cpu": processor(),
        "cores": available_cores(),
        "gpu": gpu,
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
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Return the commit of the source tree that this file is of, None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short=10", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
