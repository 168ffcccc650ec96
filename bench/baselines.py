"""Times of stages over those of calibration kernels, and their comparison with stored baselines.

A time alone says little on another machine, or on this one when it is busy. So a stage's calls take turns
with a kernel that lives on the same resource, and what counts is the quotient of the shortest times: the
rounds in which nothing else was in the way. A stage whose quotient is more than `TOLERANCE` above its
baseline is measured once more before it is called a regression.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geoengine.bench.suite.machine import describe
from geoengine.bench.suite.timing import interleaved
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.render.files import write_atomically

SCHEMA = 1
TOLERANCE = 0.20
ROUNDS = 25
STORED = Path(__file__).resolve().parent / "baselines.json"

Call = Callable[[], object]


class BaselineError(GeoEngineError):
    """Baselines that cannot be read."""


def kernels(folder: Path) -> dict[str, Call]:
    """Return the calibration kernels, some milliseconds each, on one thread.

    `gemm` multiplies fp32 matrices too small for a BLAS to start threads, `copy` moves 32 MB, `zlib`
    compresses in compiled scalar code, `python` runs the interpreter, and `disk` brings a file of 1 MB to the
    disk of `folder`.
    """
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 192, 64, 64), dtype=np.float32)
    product = np.empty_like(left)
    source, target = np.ones(32 << 20, np.uint8), np.empty(32 << 20, np.uint8)
    text = rng.integers(0, 32, 200_000, dtype=np.uint8).tobytes()
    return {
        "gemm": lambda: [np.matmul(left, right, out=product) for _ in range(2)],
        "copy": lambda: np.copyto(target, source),
        "zlib": lambda: zlib.compress(text, 1),
        "python": lambda: json.loads(json.dumps({str(n): [n, str(n * n)] for n in range(4000)})),
        "disk": lambda: _to_disk(folder / "calibration", bytes(1 << 20)),
    }


def _to_disk(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def measure(call: Call, kernel: Call, rounds: int = ROUNDS) -> float:
    """Return the shortest time of a stage over the shortest one of its kernel, in turns; one warm-up each."""
    spreads = interleaved({"kernel": kernel, "stage": call}, rounds)
    return spreads["stage"].least / spreads["kernel"].least


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A stage's ratio to its kernel, and its baseline: None where there is none for this kernel."""

    name: str
    against: str
    ratio: float
    baseline: float | None

    @property
    def change(self) -> float | None:
        """Return by how much the ratio has grown, 0.2 for 20 %."""
        return None if self.baseline is None else self.ratio / self.baseline - 1

    @property
    def regressed(self) -> bool:
        """Return whether it has grown by more than the tolerance."""
        return self.change is not None and self.change > TOLERANCE


@dataclass(kw_only=True)
class Baselines:
    """The stored ratios of stages, and those of this run."""

    machine: str = ""
    ratios: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    found: list[Compared] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Baselines:
        """Read a file; one that is not there holds none. Raises BaselineError."""
        if not path.exists():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            schema = data["schema"]
            if schema != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, got {schema}")
            ratios = {
                name: {"against": r["against"], "ratio": float(r["ratio"])}
                for name, r in data["ratios"].items()
            }
            return cls(machine=data["machine"]["name"], ratios=ratios)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaselineError(
                f"{path}: cannot be read as baselines ({error!r}): `pytest bench --write-baselines` after "
                "removing it writes new ones"
            ) from None

    def compare(self, name: str, against: str, measured: Callable[[], float]) -> Compared:
        """Measure a stage against a kernel, and again when that is a regression; the better one counts."""
        stored = self.ratios.get(name)
        baseline = stored["ratio"] if stored is not None and stored["against"] == against else None
        compared = Compared(name=name, against=against, ratio=measured(), baseline=baseline)
        if compared.regressed:
            ratio = min(compared.ratio, measured())
            compared = Compared(name=name, against=against, ratio=ratio, baseline=baseline)
        self.found.append(compared)
        return compared

    def write(self, path: Path) -> None:
        """Store the ratios of this run, and those of the stages that were not in it; raises OutputError."""
        own = {one.name: {"against": one.against, "ratio": round(one.ratio, 4)} for one in self.found}
        document = {"schema": SCHEMA, "machine": describe(), "ratios": {**self.ratios, **own}}
        write_atomically(path, json.dumps(document, indent=1, sort_keys=True) + "\n")

    @property
    def regressions(self) -> list[Compared]:
        """Return the stages that have become slower, the worst first."""
        return sorted((one for one in self.found if one.regressed), key=lambda one: -(one.change or 0.0))

    def lines(self) -> list[str]:
        """Return a table of the run for a terminal."""
        width = max((len(one.name) for one in self.found), default=0)
        lines = [f"{'stage':{width}}  kernel  ratio     baseline  change"]
        for one in self.found:
            baseline = "none" if one.baseline is None else f"{one.baseline:.3g}"
            change = "" if one.change is None else f"{one.change:+.0%}"
            mark = "  REGRESSION" if one.regressed else ""
            line = f"{one.name:{width}}  {one.against:6}  {one.ratio:<8.3g}  {baseline:8}  {change}{mark}"
            lines.append(line.rstrip())
        return lines
