"""Times: contenders take turns in one run, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

_Name = TypeVar("_Name")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Seconds of several rounds."""

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Return the spread of at least one time."""
        return cls(
            median=statistics.median(seconds), least=min(seconds), most=max(seconds), rounds=len(seconds)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)


def interleaved(
    contenders: Mapping[_Name, Callable[[], object]], rounds: int, *, warm_up: int = 1
) -> dict[_Name, Spread]:
    """Return how long each contender takes, all in turn in every round; warm-up rounds do not count."""
    times: dict[_Name, list[float]] = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: Spread.of(own) for name, own in times.items()}


def peak_memory_mib() -> float:
    """Return the most memory that this process has had resident, in MiB."""
    # Linux hands the maximum of getrusage down to programs that a process starts; VmHWM is a process's own.
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
