"""The engine's encoders and scoring beside what a user would take instead: same data, same run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from geoengine.bench.suite.peers_contenders import OURS, Setting, check_fastembed, device_of
from geoengine.bench.suite.peers_encoders import best_peer, encoder_rows, encoders_text, measure_encoders
from geoengine.bench.suite.peers_part import Part
from geoengine.bench.suite.peers_scoring import measure_scoring, quickest, scoring_rows, scoring_text
from geoengine.bench.suite.results import Progress, Results
from geoengine.bench.suite.timing import peak_memory_mib
from geoengine.engine.backends import GPU_BACKENDS
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.extras import require_extra


@dataclass(frozen=True, kw_only=True, slots=True)
class PeersSettings:
    """What is asked; `backends` are ours, `fastembed` a Python that has that package, or None.

    Raises GeoEngineError for a backend that does not exist.
    """

    part: Part = Part.both
    batch: int = 32
    rounds: int = 5
    backends: tuple[str, ...]
    fastembed: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.backends) - set(OURS))
        if unknown or not self.backends:
            raise GeoEngineError(
                f"unknown backend {', '.join(unknown) or 'none'}: there are {', '.join(OURS)}"
            )

    @property
    def benchmark(self) -> str:
        """The name of the file of results: a part alone must not replace both."""
        return "peers" if self.part is Part.both else f"peers-{self.part}"

    def to_dict(self) -> dict[str, Any]:
        """Return them JSON-ready; of fastembed's Python only that there was one."""
        return {**asdict(self), "fastembed": self.fastembed is not None}


def default_backends(*, gpu: bool) -> tuple[str, ...]:
    """Return the backends of ours that are for a machine with a GPU, or without."""
    return tuple(name for name in OURS if (name in GPU_BACKENDS) == gpu)


def check(settings: PeersSettings) -> None:
    """Raise GeoEngineError unless what was asked can be measured here."""
    if settings.part is not Part.scoring:
        require_extra("export", ("torch", "open_clip", "onnx"), "comparing encoders")
        if settings.fastembed is not None:
            check_fastembed(settings.fastembed)


def measure(settings: PeersSettings, results: Results, progress: Progress) -> None:
    """Add the rows that are not there yet; raises GeoEngineError."""
    start = time.perf_counter()

    def show(done: int, total: int, what: str) -> None:
        progress(what, done, total)

    if settings.part is not Part.scoring:
        setting = Setting(
            batch=settings.batch,
            device=device_of(settings.backends),
            backends=settings.backends,
            fastembed=settings.fastembed,
        )
        measure_encoders(setting, settings.rounds, results, show)
    if settings.part is not Part.encoders:
        measure_scoring(results, show)
    results.state(seconds=time.perf_counter() - start, peak_memory_mib=peak_memory_mib())


def tables(document: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    parts = {"Encoders": encoders_text(document), "Scoring": scoring_text(document)}
    return "\n".join(f"## {name}\n\n{text}" for name, text in parts.items() if text)


def key_figures(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the few figures that machines are compared by."""
    figures = {}
    rows = encoder_rows(document)
    found = best_peer(rows)
    if found is not None:
        ours, peer = found
        figures[f"our fastest encoder ({ours['name']})"] = f"{ours['images_per_second']:.1f} images/s"
        if peer is not None:
            share = ours["images_per_second"] / peer["images_per_second"]
            figures[f"times the best peer as right ({peer['name']})"] = f"{share:.2f}"
    for row in scoring_rows(document):
        own, other = quickest(row, ours=True), quickest(row, ours=False)
        if own and other:
            ratio = other[1]["seconds"]["median"] / own[1]["seconds"]["median"]
            figures[f"scoring {row['n']:,} rows for {row['m']}, times the quickest peer"] = f"{ratio:.2f}"
    return figures
