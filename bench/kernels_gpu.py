"""Cosine top-k on a GPU: our kernels beside PyTorch's and CuPy's matrix product and top-k, in one run.

Run as `python -m geoengine.bench.kernels_gpu`. All read the same rows, of unit length, which the others need
and ours computes again unless told. A time is of the device alone: calls wait in its queue before it starts
on them, and its cache is overwritten before each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from geoengine.bench.suite.machine import describe
from geoengine.bench.suite.results import machine_folder
from geoengine.kernels import Int8Rows, cosine_topk

ROWS = (256, 1024, 65_536, 1_000_000, 10_000_000)
WIDTHS = (512, 768)
QUERIES = (1, 16, 256)
ANSWERS = (16, 64)
DTYPES = ("float16", "bfloat16", "float32", "int8")

FLUSHED_BYTES = 256 << 20
COPIED_BYTES = 4 << 30
WAIT_CYCLES = 2_000_000  # about a millisecond: longer than any contender takes to queue its work
SHARE_OF_MEMORY = 0.4  # that rows may take: scores and copies come on top

Call = Callable[[], object]


class Case(NamedTuple):
    """One size of the problem."""

    n: int
    d: int
    m: int
    k: int


def measure(cases: list[Case], dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Time every contender on every case; returns JSON-ready figures.

    Raises RuntimeError without a GPU that PyTorch can use.
    """
    torch = _torch()

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU here")
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for (n, d), dtype in product(dict.fromkeys((case.n, case.d) for case in cases), dtypes):
        size = {"float32": 4, "int8": 1}.get(dtype, 2)
        if n * d * size > SHARE_OF_MEMORY * torch.cuda.get_device_properties(0).total_memory:
            print(f"not measured: {n} x {d} {dtype} takes too much memory")
            continue
        table = random_rows(n, d, dtype)
        for case in (case for case in cases if (case.n, case.d) == (n, d)):
            for name, seconds in timed(contenders(case, dtype, table), rounds_for(case)):
                share = n * d * size / seconds / bandwidth
                rows.append(
                    {"name": name, "dtype": dtype, **case._asdict(), "us": seconds * 1e6, "share": share}
                )
            print(f"{case} {dtype} done", flush=True)
        del table
        torch.cuda.empty_cache()
    return {"machine": describe(), "copy_bytes_per_second": bandwidth, "rows": rows}


def contenders(case: Case, dtype: str, table: Any) -> dict[str, Call]:  # noqa: ANN401 - a tensor, or Int8Rows
    """Return the calls to compare: ours, and what can be done with the same rows without it."""
    torch = _torch()

    n, d, m, k = case
    queries = torch.randn((m, d), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    kept = min(k, n)
    scores = torch.empty((m, kept), device="cuda")
    out = scores, torch.empty((m, kept), dtype=torch.int64, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream or None
    found: dict[str, Call] = {
        "geoengine": lambda: cosine_topk(table, queries, k, out=out, stream=stream),
        "geoengine, unit rows": lambda: cosine_topk(
            table, queries, k, normalized=True, out=out, stream=stream
        ),
    }
    if dtype == "int8":
        return found
    unit = torch.nn.functional.normalize(queries).to(table.dtype)
    found["PyTorch"] = lambda: torch.topk(unit @ table.T, kept)
    if dtype != "bfloat16" and m * n <= 1 << 28:
        found |= cupy_contender(unit, table, kept)
    return found


def cupy_contender(unit: Any, table: Any, kept: int) -> dict[str, Call]:  # noqa: ANN401 - tensors
    """Return CuPy's way, where CuPy is installed; it sorts all scores."""
    try:
        cupy: Any = importlib.import_module("cupy")
    except ImportError:
        return {}
    photos, rows = cupy.from_dlpack(unit), cupy.from_dlpack(table)
    return {"CuPy": lambda: cupy.argsort(-(photos @ rows.T), axis=1)[:, :kept]}


def timed(calls: dict[str, Call], rounds: int) -> Iterator[tuple[str, float]]:
    """Yield the median device seconds of each call, all of them in turn in every round."""
    torch = _torch()

    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    calls = {name: call for name, call in calls.items() if fits(name, call)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 2):  # two to warm up
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            torch.cuda._sleep(WAIT_CYCLES)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if round_number >= 2:
                seconds[name].append(start.elapsed_time(end) / 1e3)
    for name, own in seconds.items():
        yield name, statistics.median(own)


def fits(name: str, call: Call) -> bool:
    """Return whether the memory suffices for a call."""
    torch = _torch()
    try:
        call()
    except torch.cuda.OutOfMemoryError:
        print(f"not measured: {name} runs out of memory")
        return False
    return True


def rounds_for(case: Case) -> int:
    """Return how often to repeat: the less there is to do, the more."""
    work = case.n * case.m
    return 50 if work <= 1 << 20 else 15 if work <= 1 << 26 else 5


def random_rows(n: int, d: int, dtype: str) -> Any:  # noqa: ANN401 - a tensor, or Int8Rows
    """Return n random rows of unit length on the device; in int8, with their scales."""
    torch = _torch()

    generator = torch.Generator("cuda").manual_seed(0)
    kind = torch.int8 if dtype == "int8" else getattr(torch, dtype)
    table = torch.empty((n, d), dtype=kind, device="cuda")
    scales = torch.empty(n, device="cuda")
    for first in range(0, n, 1 << 18):
        chunk = slice(first, min(first + (1 << 18), n))
        values = torch.randn((chunk.stop - first, d), device="cuda", generator=generator)
        values = torch.nn.functional.normalize(values)
        if dtype == "int8":
            scales[chunk] = values.abs().amax(dim=1) / 127
            values = (values / scales[chunk, None]).round()
        table[chunk] = values.to(kind)
    return Int8Rows(table, scales) if dtype == "int8" else table


def copy_bandwidth() -> float:
    """Return the bytes a second, read and written, of the best of ten copies within device memory."""
    torch = _torch()

    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(2 * COPIED_BYTES / min(times[2:]))


def table_of(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table: ours beside the best of the others of the same rows."""
    about = figures["machine"]
    lines = [
        f"{about['gpu']}, driver {about['driver']}, PyTorch {about['packages'].get('torch')}, "
        f"{about['date']}, commit {about['commit']}; copies run at "
        f"{figures['copy_bytes_per_second'] / 1e12:.2f} TB/s.",
        "",
        "| rows | d | queries | k | dtype | geoengine µs | share of copy speed | unit rows µs | PyTorch µs "
        "| CuPy µs | PyTorch / geoengine |",
        "| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in figures["rows"]:
        key = tuple(row[name] for name in ("n", "d", "m", "k", "dtype"))
        cases.setdefault(key, {})[row["name"]] = row
    for (n, d, m, k, dtype), by_name in cases.items():
        ours = by_name["geoengine"]
        cells = [f"{n:,}", d, m, k, dtype, f"{ours['us']:.1f}", f"{ours['share']:.0%}"]
        for name in ("geoengine, unit rows", "PyTorch", "CuPy"):
            cells.append(f"{by_name[name]['us']:.1f}" if name in by_name else "")
        ratio = f"{by_name['PyTorch']['us'] / ours['us']:.1f}" if "PyTorch" in by_name else ""
        lines.append("| " + " | ".join(str(cell) for cell in [*cells, ratio]) + " |")
    return "\n".join(lines) + "\n"


def _torch() -> Any:  # noqa: ANN401 - PyTorch types its CUDA part in places only
    import torch

    return torch


def main() -> None:
    """Measure, print the table, and write it and the figures to a folder named after the GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of results")
    options = parser.parse_args()
    cases = [Case(*sizes) for sizes in product(options.rows, options.widths, QUERIES, ANSWERS)]
    figures = measure(cases, tuple(options.dtypes))
    folder = machine_folder(options.out)
    (folder / "kernels.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (folder / "kernels.md").write_text(table_of(figures), encoding="utf-8")
    print(table_of(figures))


if __name__ == "__main__":
    main()
