"""TensorRT's plans in an engine bundle: for which machine, built from what, and whether they can be used.

```
tensorrt/<gpu>-sm<cc>-trt<version>/
  plans.json      what `PlanSet` holds, as JSON
  *.plan          one per ONNX file
  timing.cache    TensorRT's measurements, so that a plan built again is built fast and is the same
```
A plan runs only with the GPU, the TensorRT and the driver that it was built with. `plans.json` names a plan
only when the whole of it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError
from geoengine.engine.manifest import Variant

FOLDER = "tensorrt"
PLANS_FILE = "plans.json"
TIMING_CACHE = "timing.cache"
SCHEMA = 1
VARIANT = Variant.fp16

Profile: TypeAlias = tuple[int, int, int]
"""The smallest batch, the one that kernels are chosen for, and the largest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a plan is tied to: a GPU, its compute capability ("9.0"), its driver's CUDA ("13.0"), TensorRT."""

    gpu: str
    compute_capability: str
    driver: str
    tensorrt: str

    @property
    def folder(self) -> str:
        """The name of the folder of this machine's plans; drivers share one."""
        gpu = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-") or "gpu"
        return f"{gpu}-sm{self.compute_capability.replace('.', '')}-trt{self.tensorrt}"

    def __str__(self) -> str:
        return f"{self.gpu} (compute capability {self.compute_capability}) with TensorRT {self.tensorrt}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """How plans are built: the largest batch, builder flags (on or off), optimisation level 0 to 5."""

    max_batch: int
    flags: Mapping[str, bool]
    level: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One plan: its file and checksum, what it was built from, and what it needs.

    `sources` maps the ONNX file and its weight files, as paths in the bundle, to their SHA-256. `profiles`
    rise; where pictures are large, they end before the configuration's largest batch.
    `scratch_bytes` is the GPU memory that running it takes besides weights, inputs and outputs,
    `fused_attention` the number of attention blocks that TensorRT runs as one kernel.
    """

    file: str
    bytes: int
    sha256: str
    key: str
    sources: Mapping[str, str]
    profiles: tuple[Profile, ...]
    scratch_bytes: int
    fused_attention: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PlanSet:
    """A folder of plans: for which machine, how built, the plans by ONNX file, and whether they are right.

    `checked` tells that the plans were held to the gates of a build; others are not used.
    """

    folder: Path
    machine: Machine
    config: PlanConfig
    plans: Mapping[str, Plan]
    checked: bool = False

    def save(self) -> None:
        """Write `plans.json`, replacing the old one at once."""
        data = {
            "schema": SCHEMA,
            "machine": asdict(self.machine),
            "config": asdict(self.config),
            "checked": self.checked,
            "plans": {graph: asdict(plan) for graph, plan in self.plans.items()},
        }
        write_whole(self.folder / PLANS_FILE, (json.dumps(data, indent=2) + "\n").encode())


def plan_key(
    machine: Machine, config: PlanConfig, profiles: Sequence[Profile], sources: Mapping[str, str]
) -> str:
    """Return the SHA-256 of all that decides what a plan is: a plan with this key need not be built again."""
    parts = {
        "schema": SCHEMA,
        "machine": asdict(machine),
        "config": asdict(config),
        "profiles": list(profiles),
        "sources": dict(sources),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_plans(folder: Path) -> PlanSet:
    """Read a folder's `plans.json`; raises ValueError saying what is wrong, OSError when it is unreadable."""
    data = json.loads((folder / PLANS_FILE).read_text(encoding="utf-8"))
    try:
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r:.40} is not {SCHEMA}")
        machine = Machine(**data["machine"])
        config = PlanConfig(**data["config"])
        checked = data["checked"] is True
        plans = {graph: _plan(entry) for graph, entry in data["plans"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"it lacks or misspells a field ({error})") from error
    for plan in plans.values():
        if Path(plan.file).name != plan.file or not plan.file.endswith(".plan"):
            raise ValueError(f"{plan.file!r:.80} is no file name of a plan")
        if not isinstance(plan.scratch_bytes, int) or plan.scratch_bytes < 0:
            raise ValueError(f'"scratch_bytes" must be a size, got {plan.scratch_bytes!r:.40}')
        if plan.key != plan_key(machine, config, plan.profiles, plan.sources):
            raise ValueError(f"the key of {plan.file} does not fit what it was built from")
    return PlanSet(folder, machine, config, plans, checked)


def require_plans(bundle: EngineBundle) -> None:
    """Raise BackendError when a bundle has no plans for any machine, before CUDA and TensorRT are loaded."""
    if not any((bundle.path / FOLDER).glob(f"*/{PLANS_FILE}")):
        raise BackendError(f"engine bundle {bundle.path} has no TensorRT plans: {remedy(bundle)}")


def find_plans(bundle: EngineBundle, machine: Machine, *, unchecked: bool = False) -> PlanSet:
    """Return the bundle's plans for a machine; raises BackendError with the command that builds them.

    All plans are there, of the right size, and built from the bundle's own graphs. They have passed the gates
    of a build, unless `unchecked`. Checksums of the plans are left to `read_plan`.
    """
    folder = bundle.path / FOLDER / machine.folder
    if not (folder / PLANS_FILE).is_file():
        there = ", ".join(str(known.machine) for known in other_plans(bundle)) or "none at all"
        raise BackendError(
            f"engine bundle {bundle.path} has no TensorRT plans for {machine}; it has {there}: "
            f"{remedy(bundle)}"
        )
    try:
        found = load_plans(folder)
    except (OSError, ValueError) as error:
        raise BackendError(f"{folder / PLANS_FILE} cannot be used: {error}; {remedy(bundle)}") from error
    if found.machine != machine:
        raise BackendError(
            f"the TensorRT plans in {folder} were built with a driver for CUDA {found.machine.driver}, and "
            f"this one is for CUDA {machine.driver}: {remedy(bundle)}"
        )
    for graph in bundle.manifest.graphs[VARIANT].files():
        problem = _problem(bundle, found, graph)
        if problem:
            raise BackendError(f"the TensorRT plans in {folder} cannot be used: {problem}; {remedy(bundle)}")
    if not (found.checked or unchecked):
        raise BackendError(
            f"the TensorRT plans in {folder} have not been checked, because their build was interrupted: "
            f"{remedy(bundle)}"
        )
    return found


def read_plan(bundle: EngineBundle, plans: PlanSet, graph: str) -> bytes:
    """Return the bytes of a graph's plan, checked; raises BackendError for a damaged file."""
    plan = plans.plans[graph]
    file = plans.folder / plan.file
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BackendError(f"{file} cannot be read: {error}; {remedy(bundle)}") from error
    if hashlib.sha256(data).hexdigest() != plan.sha256:
        raise BackendError(f"{file} is damaged: its SHA-256 is not the one in {PLANS_FILE}; {remedy(bundle)}")
    return data


def other_plans(bundle: EngineBundle) -> list[PlanSet]:
    """Return all plans of a bundle, whatever machine they are for; damaged ones are left out."""
    found = []
    for file in sorted((bundle.path / FOLDER).glob(f"*/{PLANS_FILE}")):
        try:
            found.append(load_plans(file.parent))
        except (OSError, ValueError):
            continue
    return found


def remedy(bundle: EngineBundle) -> str:
    """Return the command that builds the plans for the machine that it runs on, in words."""
    return f"build them here with `geoengine build-engines --plans --out {bundle.path}`"


def intact(plans: PlanSet, plan: Plan) -> bool:
    """Tell whether a plan's file is there and has its checksum."""
    try:
        data = (plans.folder / plan.file).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == plan.sha256


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever sees a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _problem(bundle: EngineBundle, plans: PlanSet, graph: str) -> str | None:
    plan = plans.plans.get(graph)
    if plan is None or graph not in plan.sources:
        return f"there is none for {graph}"
    for source, digest in plan.sources.items():
        entry = bundle.manifest.files.get(source)
        if entry is None or entry.sha256 != digest:
            return f"{plan.file} was built from another {source}"
    file = plans.folder / plan.file
    if not file.is_file():
        return f"{plan.file} is missing"
    if file.stat().st_size != plan.bytes:
        return f"{plan.file} is damaged: it has {file.stat().st_size} bytes instead of {plan.bytes}"
    return None


def _plan(entry: Mapping[str, Any]) -> Plan:
    return Plan(**{**entry, "profiles": _profiles(entry["profiles"])})


def _profiles(value: Sequence[Any]) -> tuple[Profile, ...]:
    profiles = []
    below = 0
    for low, best, high in value:
        if not all(isinstance(size, int) for size in (low, best, high)) or not below < low <= best <= high:
            raise ValueError(f'"profiles" must be rising batch sizes, got {value!r:.80}')
        profiles.append((low, best, high))
        below = high
    if not profiles:
        raise ValueError('"profiles" is empty')
    return tuple(profiles)
