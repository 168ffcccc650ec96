"""Running a bundle through every backend of this machine, and compiling it for the GPU of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import BACKENDS, TENSORRT, Backend, open_backend
from geoengine.engine.bundle import GEOCLIP, EngineBundle
from geoengine.engine.errors import BackendError, ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.parity import Measurement, measure
from geoengine.export.reference import REFERENCE, Reference, checked_pairs, load_reference
from geoengine.export.report import BuildReport, make_report

Progress = Callable[[int, int, str], None]
"""Called with the steps done, their number, and what comes next ("" at the end)."""

Noted = Callable[[str, Callable[[], Any]], Any]
"""Returns the value of the function, or what an earlier run noted under the name."""


class Steps:
    """Counts steps and tells the caller of each; `total` is 0 until it is known."""

    def __init__(self, progress: Progress | None) -> None:
        self.total = 0
        self.done = -1
        self._progress = progress

    def __call__(self, doing: str) -> None:
        """Begin the next step."""
        self.done += 1
        if self._progress is not None:
            self._progress(self.done, self.total and max(self.total, self.done), doing)


def pairs_of(bundle: EngineBundle) -> list[tuple[str, int]]:
    """Return which encoder of a bundle is checked at which side."""
    graphs = next(iter(bundle.manifest.graphs.values()))
    return checked_pairs(tuple(graphs.heads), tuple(sorted(graphs.trunks)), bundle.image_size)


def check_backends(
    bundle: EngineBundle,
    reference: Reference,
    steps: Steps,
    *,
    backends: tuple[str, ...] = BACKENDS,
    required: str | None = None,
    opening: Callable[..., Backend] = open_backend,
    noted: Noted = lambda what, work: work(),
) -> tuple[list[Measurement], dict[str, str]]:
    """Hold every graph to the gates on each backend that runs it here.

    `opening` opens a backend. Returns the measurements, and why the other backends cannot run. Raises
    ExportError when a gate is not passed, BackendError when the backend `required` cannot run.
    """
    missing = [pair for pair in pairs_of(bundle) if pair not in reference]
    if missing:
        encoder, side = missing[0]
        raise ExportError(
            f"{bundle.path / REFERENCE} has no embeddings of encoder {encoder} at {side} px to compare with: "
            "build the bundle again"
        )
    results: list[Measurement] = []
    skipped: dict[str, str] = {}
    for name in backends:
        ran = False
        for variant in bundle.variants:
            try:
                backend = opening(bundle, backend=name, precision=variant)
            except BackendError as error:
                skipped.setdefault(name, str(error))
                continue
            ran = True
            try:
                for encoder, side in pairs_of(bundle):
                    steps(f"check encoder {encoder} at {side} px on {name}, {variant}")
                    work = partial(_figures, backend, encoder, side, reference[encoder, side])
                    figures = noted(f"{name} {variant} {encoder} {side}", work)
                    results.append(Measurement.from_dict(figures))
            finally:
                backend.close()
        if ran:
            skipped.pop(name, None)
        elif name == required:
            raise BackendError(skipped[name])
    return results, skipped


def _figures(backend: Backend, encoder: str, side: int, expected: NDArray[np.float32]) -> dict[str, Any]:
    return measure(backend, encoder, side, expected).to_dict()


def verify_bundle(path: str | Path, progress: Progress | None = None) -> BuildReport:
    """Check a bundle again: checksums, valid graphs, and a build's gates on every backend that runs here.

    Needs neither PyTorch nor the weights that it was built from: a bundle carries PyTorch's embeddings of the
    test pictures. Graphs are checked where the onnx package is installed. Raises BundleError for a damaged
    bundle, ExportError for one that fails a check.
    """
    start = time.perf_counter()
    steps = Steps(progress)
    steps("read the bundle")
    bundle = EngineBundle.open(path)
    geoclip = bundle.geoclip()
    report = _verify(bundle, steps, start)
    if geoclip is not None and geoclip.path != bundle.path:
        report = report.joined(_verify(geoclip, steps, start), GEOCLIP)
    steps("")
    return report


def _verify(bundle: EngineBundle, steps: Steps, start: float) -> BuildReport:
    reference = load_reference(bundle.path / REFERENCE)
    if find_spec("onnx") is not None:
        from geoengine.export.onnx_graphs import check_graph

        for graphs in bundle.manifest.graphs.values():
            for name in graphs.files():
                steps(f"check {name}")
                check_graph(bundle.path / name)
    results, skipped = check_backends(bundle, reference, steps)
    figures: Mapping[str, Any] = {}
    if bundle.manifest.geoclip is not None:
        from geoengine.export.geoclip_check import check_geoclip

        steps("check the location encoder and the gallery")
        figures = check_geoclip(bundle)
    return make_report(bundle, results, skipped, time.perf_counter() - start, figures)


def compile_bundle(path: str | Path, *, max_batch: int, progress: Progress | None = None) -> BuildReport:
    """Compile a bundle's fp16 graphs with TensorRT for this machine's GPU, and hold the plans to the gates.

    `max_batch` is the largest number of pictures that the plans take at once. Raises BackendError when
    TensorRT cannot run here or the GPU has no room, ExportError when a graph cannot be compiled, or when a
    plan fails a check, which removes the plans. Plans that were not checked are refused until they have been.
    GeoCLIP inside the bundle is compiled too, if it has fp16 graphs.
    """
    bundle = EngineBundle.open(path)
    geoclip = bundle.geoclip()
    report = _compile(bundle, max_batch, progress)
    if geoclip is not None and geoclip.path != bundle.path and Variant.fp16 in geoclip.variants:
        report = report.joined(_compile(geoclip, max_batch, progress), GEOCLIP)
    return report


def _compile(bundle: EngineBundle, max_batch: int, progress: Progress | None) -> BuildReport:
    from geoengine.engine.backends.tensorrt import TensorRt
    from geoengine.export.tensorrt import build_plans, mark_checked, remove_plans

    start = time.perf_counter()
    steps = Steps(progress)
    reference = load_reference(bundle.path / REFERENCE)
    build_plans(bundle, max_batch=max_batch, progress=progress)

    def unchecked(bundle: EngineBundle, *, backend: str, precision: str) -> Backend:
        assert backend == TENSORRT
        return TensorRt(bundle, precision=precision, unchecked=True)

    try:
        results, _ = check_backends(
            bundle, reference, steps, backends=(TENSORRT,), required=TENSORRT, opening=unchecked
        )
        mark_checked(bundle)
    except ExportError:
        remove_plans(bundle)
        raise
    steps("")
    return make_report(bundle, results, {}, time.perf_counter() - start, {})
