"""Building TensorRT plans for the GPU of this machine into an engine bundle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from geoengine.engine.backends.cuda import gpu_info
from geoengine.engine.backends.gpu import pictures_per_batch
from geoengine.engine.backends.plans import (
    FOLDER,
    PLANS_FILE,
    TIMING_CACHE,
    VARIANT,
    Plan,
    PlanConfig,
    PlanSet,
    Profile,
    intact,
    load_plans,
    plan_key,
)
from geoengine.engine.backends.tensorrt_runner import this_machine
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import ExportError
from geoengine.export.resample import resizes

Progress = Callable[[int, int, str], None]
"""Called with the hundredths done, their number (100 a plan), and what is being done ("" at the end)."""

MIN_BATCH, MAX_BATCH = 8, 4096
DEFAULT_BATCH, DEFAULT_LEVEL = 1024, 3

FLAGS = {"DISTRIBUTIVE_INDEPENDENCE": True, "TF32": False}
"""A picture's embedding must not depend on its batch, and fp32 stays fp32."""

_CHILD = (sys.executable, "-m", "geoengine.export.plan_builder")
_GRACE_SECONDS = 10
"""How long a build that shall end may take to notice; TensorRT asks between steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """One plan of a bundle: paths relative to the bundle, and whether it was there already."""

    artifact: str
    graph: str
    bytes: int
    seconds: float
    reused: bool
    fused_attention: int


def build_plans(
    bundle: EngineBundle,
    *,
    max_batch: int = DEFAULT_BATCH,
    level: int = DEFAULT_LEVEL,
    progress: Progress | None = None,
) -> list[PlanReport]:
    """Build what is missing of the bundle's TensorRT plans for this machine; returns all of them.

    Each plan is put in place as soon as it is whole, so that a build that was interrupted goes on where it
    was; none is used before `mark_checked`. `level` is TensorRT's optimisation level, 0 (built fast) to 5
    (runs fast). One process builds at a time; another one waits. Raises BackendError when CUDA or TensorRT
    cannot be loaded, ExportError saying which node or layer of which graph TensorRT cannot build and why.
    KeyboardInterrupt ends the build.
    """
    config = plan_settings(max_batch, level)
    graphs = _graphs(bundle)
    machine = this_machine(gpu_info())
    folder = bundle.path.absolute() / FOLDER / machine.folder
    folder.mkdir(parents=True, exist_ok=True)
    show = progress or (lambda done, total, doing: None)
    with _locked(folder, lambda: show(0, 0, "wait for another process that builds plans here")):
        for rest in folder.glob(".*.tmp"):
            rest.unlink()
        read = {graph: _read(bundle, graph, max_batch) for graph in graphs}
        done = _reusable(PlanSet(folder, machine, config, {}), read)
        missing = [graph for graph in graphs if graph not in done.plans]
        reused = frozenset(done.plans)
        if missing:
            _check_space(bundle, folder, [path for graph in missing for path in read[graph].sources])
            done = _Build(bundle, done, read, show).run(missing)
        show(100 * len(graphs), 100 * len(graphs), "")
        return [_report(done, graph, graph in reused) for graph in graphs]


def mark_checked(bundle: EngineBundle) -> None:
    """Note that the bundle's plans for this machine have passed the gates: from here on they are used."""
    plans = load_plans(bundle.path.absolute() / FOLDER / this_machine(gpu_info()).folder)
    replace(plans, checked=True).save()


def remove_plans(bundle: EngineBundle) -> None:
    """Remove the bundle's TensorRT plans for this machine, and with them the measurements they came from."""
    folder = bundle.path / FOLDER / this_machine(gpu_info()).folder
    (folder / PLANS_FILE).unlink(missing_ok=True)  # from here on nobody loads them
    shutil.rmtree(folder, ignore_errors=True)


def plan_settings(max_batch: int, level: int) -> PlanConfig:
    """Return how plans for batches up to `max_batch` are built; raises ExportError for impossible values."""
    if not MIN_BATCH <= max_batch <= MAX_BATCH:
        raise ExportError(f"--max-batch must be from {MIN_BATCH} to {MAX_BATCH}, got {max_batch}")
    if not 0 <= level <= 5:
        raise ExportError(f"TensorRT's optimisation level must be from 0 to 5, got {level}")
    return PlanConfig(max_batch=max_batch, flags=FLAGS, level=level)


def plan_profiles(max_batch: int) -> tuple[Profile, ...]:
    """Return the profiles for batches up to `max_batch`.

    Small batches have one of their own, because a kernel chosen for large ones wastes most of itself on them.
    None is for a single picture alone: TensorRT has built wrong plans for that.
    """
    largest = max(max_batch, 2)
    small = (1, min(8, largest), min(32, largest))
    return (small, (33, min(256, largest), largest)) if largest > 32 else (small,)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A graph's files by path in the bundle, its batches, and its nodes that may compute in fp32."""

    sources: dict[str, str]
    profiles: tuple[Profile, ...]
    exact: list[str]


class _Build:
    """One run of the building process: sends it the job, follows its events, puts plans in place."""

    def __init__(
        self, bundle: EngineBundle, done: PlanSet, graphs: Mapping[str, _Graph], show: Progress
    ) -> None:
        self._bundle, self._done, self._graphs, self._show = bundle, done, graphs, show

    def run(self, graphs: Sequence[str]) -> PlanSet:
        """Build the plans of these graphs and return all that there are."""
        job = {
            "config": asdict(self._done.config),
            "cache": str(self._done.folder / TIMING_CACHE),
            "plans": [
                {
                    "graph": graph,
                    "onnx": str(self._bundle.path.absolute() / graph),
                    "plan": str(self._temporary(graph)),
                    "profiles": self._graphs[graph].profiles,
                    "exact": self._graphs[graph].exact,
                }
                for graph in graphs
            ],
        }
        with tempfile.TemporaryFile() as log:
            # A session of its own: Ctrl-C reaches only this process, which then tells the other one.
            child = subprocess.Popen(
                _CHILD,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                text=True,
            )
            assert child.stdin is not None and child.stdout is not None
            try:
                self._announce(graphs[0], "start TensorRT", 0)
                child.stdin.write(json.dumps(job) + "\n")
                child.stdin.flush()
                failure = self._follow(child.stdout, graphs)
            except BrokenPipeError:
                failure = None  # it ended before it read the job
            finally:
                status = _end(child)
            if failure is not None:
                raise ExportError(failure)
            left = [graph for graph in graphs if graph not in self._done.plans]
            if left:
                raise ExportError(_crash(left[0], status, log))
        return self._done

    def _follow(self, events: IO[str], graphs: Sequence[str]) -> str | None:
        """Act on the events until there are no more; returns why the build failed, if it did."""
        for line in events:
            event = json.loads(line)
            if event["event"] == "progress":
                self._announce(event["graph"], event["phase"], event["share"])
            elif event["event"] == "built":
                self._keep(event)
            else:
                return str(event.get("reason", "the build was stopped"))
        return None

    def _announce(self, graph: str, phase: str, share: float) -> None:
        done = 100 * len(self._done.plans) + int(100 * share)
        self._show(done, 100 * len(self._graphs), f"{_plan_name(graph)}: {phase}")

    def _keep(self, event: Mapping[str, Any]) -> None:
        """Put a finished plan in place, then name it in `plans.json`."""
        graph = event["graph"]
        read = self._graphs[graph]
        data = self._temporary(graph).read_bytes()
        plan = Plan(
            file=_plan_name(graph),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            key=plan_key(self._done.machine, self._done.config, read.profiles, read.sources),
            sources=read.sources,
            profiles=read.profiles,
            scratch_bytes=event["scratch_bytes"],
            fused_attention=event["fused_attention"],
            seconds=round(event["seconds"], 3),
        )
        os.replace(self._temporary(graph), self._done.folder / plan.file)
        self._done = replace(self._done, plans={**self._done.plans, graph: plan})
        self._done.save()

    def _temporary(self, graph: str) -> Path:
        return self._done.folder / f".{_plan_name(graph)}.tmp"


def _end(child: subprocess.Popen[str]) -> int:
    """Tell the building process to end, wait for it, at last kill it; returns its exit status."""
    assert child.stdin is not None and child.stdout is not None
    with suppress(BrokenPipeError):  # it may have ended already
        child.stdin.close()
    try:
        return child.wait(_GRACE_SECONDS)
    except BaseException as reason:  # also when Ctrl-C comes again
        child.kill()
        child.wait()
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
        return child.returncode
    finally:
        child.stdout.close()


def _crash(graph: str, status: int, log: IO[bytes]) -> str:
    log.seek(max(log.seek(0, os.SEEK_END) - 2000, 0))
    lines = log.read().decode(errors="replace").split("\n")
    said = "; ".join(line.strip() for line in lines[-4:] if line.strip()) or "nothing"
    how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
    return (
        f"the process that builds TensorRT plans ended with {how} at {_plan_name(graph)}; it last said: "
        f"{said}. Plans built before are kept: run the command again, with a smaller --max-batch if memory "
        "ran out"
    )


def _graphs(bundle: EngineBundle) -> list[str]:
    graphs = bundle.manifest.graphs.get(VARIANT)
    if graphs is None:
        raise ExportError(
            f"engine bundle {bundle.path} has no {VARIANT} graphs, which TensorRT needs: build it with "
            f"`geoengine build-engines --precision {VARIANT}`"
        )
    return graphs.files()


def _plan_name(graph: str) -> str:
    name = Path(graph).name.removesuffix(".onnx").removesuffix(f".{VARIANT}")
    return f"{name}.plan"


def _read(bundle: EngineBundle, graph: str, max_batch: int) -> _Graph:
    import onnx

    model = onnx.load(str(bundle.path / graph), load_external_data=False)
    paths = {graph}
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                paths.add((Path(graph).parent / entry.value).as_posix())
    files = bundle.manifest.files
    strange = sorted(path for path in paths if path not in files)
    if strange:
        raise ExportError(
            f"{graph} points to {strange[0]}, which the manifest of {bundle.path} does not name"
        )
    sides = {name: side for side, name in bundle.manifest.graphs[VARIANT].trunks.items()}
    if graph in sides:  # a head takes what any trunk gives
        max_batch = pictures_per_batch(bundle, VARIANT, sides[graph], max_batch)
    return _Graph(
        profiles=plan_profiles(max_batch),
        sources={path: files[path].sha256 for path in sorted(paths)},
        exact=[node.name for node in model.graph.node if any(map(resizes, node.input))],
    )


def _reusable(wanted: PlanSet, graphs: Mapping[str, _Graph]) -> PlanSet:
    """Return `wanted` with those plans that its folder has already, whole and built from the same things."""
    try:
        there = load_plans(wanted.folder).plans
    except (OSError, ValueError):
        return wanted
    kept = {
        graph: there[graph]
        for graph, read in graphs.items()
        if graph in there
        and there[graph].key == plan_key(wanted.machine, wanted.config, read.profiles, read.sources)
        and intact(wanted, there[graph])
    }
    return replace(wanted, plans=kept)


def _check_space(bundle: EngineBundle, folder: Path, sources: Sequence[str]) -> None:
    """Raise ExportError unless there is room for plans as large as all the files that they are built from."""
    needed = sum(bundle.manifest.files[path].bytes for path in sources)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder} has {free / 1e6:.0f} MB free, and the plans may need {needed / 1e6:.0f} MB: make room"
        )


def _report(plans: PlanSet, graph: str, reused: bool) -> PlanReport:
    plan = plans.plans[graph]
    return PlanReport(
        artifact=f"{FOLDER}/{plans.folder.name}/{plan.file}",
        graph=graph,
        bytes=plan.bytes,
        seconds=plan.seconds,
        reused=reused,
        fused_attention=plan.fused_attention,
    )


@contextmanager
def _locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a plan folder, which ends with the process; calls `waiting` when another holds it."""
    import fcntl

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
