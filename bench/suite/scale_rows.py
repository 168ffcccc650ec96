"""What an index costs by its rows: opening it, its memory, and scoring all of it against one photo.

    python -m geoengine.bench.suite.scale_rows FOLDER

opens the index in a folder, in a fresh process, and prints figures; `measure_rows` writes indices of random
rows and runs that. Rows are mapped: resident pages of the file can be taken back at any time, and memory of
the process itself stays small.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.suite.results import Results
from geoengine.bench.suite.timing import Spread
from geoengine.bench.suite.workload import suite_folder
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.index.segments import write_segment
from geoengine.engine.index.tile_index import Area, Description, Maker, TileIndex, level_file

WIDTH = 512
"""Of ViT-B/32's embeddings."""

_ZOOM = 12  # of all rows; the first that has 10^7 tiles
_BLOCK = 65_536
_K = 16
_ROUNDS, _LONG_S = 15, 5.0
_ROOM = 1.15  # times the file: what else the machine does needs memory too


class ScalingError(GeoEngineError):
    """An index cannot be measured."""


def measure_rows(counts: Sequence[int], results: Results, progress: Callable[..., None]) -> None:
    """Add a row for each size; one that disk or memory is too small for says so."""
    for count in counts:
        key = f"rows/{count}"
        if results.known(key):
            continue
        progress(f"index of {count:,} rows", 0, None)
        home = suite_folder()
        home.mkdir(parents=True, exist_ok=True)
        size = count * (2 * WIDTH + 8)
        lacking = lacks(size, shutil.disk_usage(home).free, available_memory())
        if lacking:
            results.add(key, part="rows", rows=count, bytes=size, left_out=lacking)
            continue
        with tempfile.TemporaryDirectory(dir=home) as folder:
            write_index(Path(folder), count)
            results.add(key, part="rows", rows=count, bytes=size, **_in_fresh_process(folder))


def lacks(size: int, disk: int, memory: int) -> str:
    """Return why an index of so many bytes cannot be measured, "" when it can."""
    for name, there in (("disk", disk), ("memory", memory)):
        if there < _ROOM * size:
            return f"needs {_ROOM * size / 1e9:.1f} GB of {name}, and {there / 1e9:.1f} are free"
    return ""


def write_index(folder: Path, count: int) -> None:
    """Write an index of one complete level with random unit rows."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((min(count, _BLOCK), WIDTH), dtype=np.float32)
    block = (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)
    names = ("encoder", "source", "model", "backend", "variant", "tiles", "attribution", "world")
    ids = np.arange(count, dtype=np.uint64)
    write_segment(level_file(folder, _ZOOM), _ZOOM, ids, ids[:0], WIDTH, _blocks(block, count))
    maker = Maker(width=WIDTH, **dict.fromkeys(names, "random"))
    Description(maker=maker, areas=(Area(),), complete=(_ZOOM,)).write(folder)


def _blocks(block: NDArray[np.float16], count: int) -> Iterator[NDArray[np.float16]]:
    return (block[: min(len(block), count - start)] for start in range(0, count, len(block)))


def _in_fresh_process(folder: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "geoengine.bench.suite.scale_rows", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ScalingError(f"an index of random rows could not be scored: {last}")
    return dict(json.loads(done.stdout))


def score(folder: Path) -> dict[str, Any]:
    """Open the index and score one photo against all of its rows, several times."""
    from geoengine.kernels import cosine_topk

    before = resident_mib()
    start = time.perf_counter()
    table = TileIndex(folder).table(_ZOOM, None)
    opening_s = time.perf_counter() - start
    opened = resident_mib()
    assert table is not None
    query = np.random.default_rng(1).normal(size=(1, WIDTH)).astype(np.float32)
    times: list[float] = []
    while len(times) < 4 or (len(times) < _ROUNDS and sum(times) < _LONG_S):
        start = time.perf_counter()
        cosine_topk(table.matrix, query, _K)
        times.append(time.perf_counter() - start)
    after = resident_mib()
    own, mapped = (_grown(before, after, kind) for kind in ("RssAnon", "RssFile"))
    return {
        "opening_s": opening_s,
        "opening_mib": sum(_grown(before, opened, kind) for kind in ("RssAnon", "RssFile")),
        "own_mib": own,
        "mapped_mib": mapped,
        "first_s": times[0],
        "scoring_s": Spread.of(times[1:]).to_dict(),
    }


def _grown(before: dict[str, float], after: dict[str, float], kind: str) -> float:
    return after.get(kind, 0.0) - before.get(kind, 0.0)


def resident_mib() -> dict[str, float]:
    """Return this process's resident memory in MiB, its own and that of mapped files; {} but on Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith(("RssAnon", "RssFile")))
    return {name: int(value.split()[0]) / 1024 for name, value in pairs}


def available_memory() -> int:
    """Return the bytes of memory that can be had, of which mapped files count as free."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # only Linux has it
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(score(Path(sys.argv[1]))))
