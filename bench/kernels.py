"""Time `cosine_topk` on the CPU against its peers: `python -m geoengine.bench.kernels`.

Every method answers the same question, the k best of n rows of length 1 for m queries, from rows that lie
ready in the form that the method likes best. All methods of a case take turns within one run, so that
whatever else the machine does falls on all of them; ratios are of medians. A turn of a quick method is many
calls in a row, and a pause goes before it in which other libraries' threads fall asleep. The bandwidth is
that of reading the rows and doing nothing with them, measured in the same turns. Needs the `bench` extra;
peers that are missing are left out. Writes a JSON file and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geoengine.bench.readme import table
from geoengine.bench.suite.machine import describe
from geoengine.bench.suite.results import machine_folder
from geoengine.kernels import cosine_topk, kernel_names, quantize_rows

RESULTS = Path(__file__).resolve().parent / "results"
OURS = ("ours fp32", "ours fp16", "ours fp16, lengths too", "ours fp16 + int8 look")
READ = "read fp16"
_PACKAGES = ("numpy", "torch", "faiss-cpu", "usearch")
_MOST_TURNS = 300
_FEWEST_TURNS = 3
_BLOCK = 65_536
_CALLS = 20  # of a quick method at a turn; the first quarter does not count
_QUICK = 2e-3  # seconds
_PAUSE = 5e-3  # seconds
_BEYOND_CACHES = 200_000_000  # bytes

Method = Callable[[npt.NDArray[np.float32], int], object]


class Case(NamedTuple):
    """One question: n rows of d values, m queries, the k best."""

    n: int
    d: int
    m: int
    k: int


class Table:
    """Rows of random direction and length 1, in the forms that the methods read.

    `missing` are peers that are not installed, each with the command that installs it.
    """

    def __init__(self, n: int, d: int, threads: int) -> None:
        rng = np.random.default_rng(n + d)
        self.single = np.empty((n, d), np.float32)
        for first in range(0, n, _BLOCK):
            block = self.single[first : first + _BLOCK]
            rng.standard_normal(out=block, dtype=np.float32)
            block /= np.linalg.norm(block, axis=1, keepdims=True)
        self.half = self.single.astype(np.float16)
        self.threads = threads
        self.methods: dict[str, Method] = {READ: self._reader(), **self._ours()}
        self.missing: dict[str, str] = {}
        peers = {
            self._numpy: ("NumPy fp32", "numpy"),
            self._torch: ("PyTorch", "torch"),
            self._faiss: ("faiss", "faiss-cpu"),
            self._usearch: ("usearch exact fp16", "usearch"),
        }
        for peer, (name, package) in peers.items():
            try:
                self.methods |= peer()
            except ImportError:
                self.missing[name] = f"pip install {package}"

    def _reader(self) -> Method:
        words = self.half.reshape(-1).view(np.uint64 if self.half.size % 4 == 0 else np.uint16)
        shares = np.array_split(words, self.threads)
        pool = ThreadPoolExecutor(self.threads)
        return lambda queries, k: list(pool.map(np.bitwise_xor.reduce, shares))

    def _ours(self) -> dict[str, Method]:
        scan = quantize_rows(self.half)
        single, half = self.single, self.half
        return {
            OURS[0]: lambda queries, k: cosine_topk(single, queries, k, normalized=True),
            OURS[1]: lambda queries, k: cosine_topk(half, queries, k, normalized=True),
            OURS[2]: lambda queries, k: cosine_topk(half, queries, k),
            OURS[3]: lambda queries, k: cosine_topk(half, queries, k, normalized=True, scan=scan),
        }

    def _numpy(self) -> dict[str, Method]:
        rows = self.single

        def search(queries: npt.NDArray[np.float32], k: int) -> object:
            scores = queries @ rows.T
            best = np.argpartition(-scores, min(k, len(rows)) - 1, axis=1)[:, :k]
            taken = np.take_along_axis(scores, best, axis=1)
            order = np.argsort(-taken, axis=1)
            return np.take_along_axis(taken, order, axis=1), np.take_along_axis(best, order, axis=1)

        return {"NumPy fp32": search}

    def _torch(self) -> dict[str, Method]:
        import torch

        torch.set_num_threads(self.threads)
        single = torch.from_numpy(self.single)
        half = single.to(torch.bfloat16)

        def search(rows: torch.Tensor, queries: npt.NDArray[np.float32], k: int) -> object:
            scores = torch.from_numpy(queries).to(rows.dtype) @ rows.T
            return torch.topk(scores, min(k, len(rows)), dim=1)

        return {
            "PyTorch fp32": lambda queries, k: search(single, queries, k),
            "PyTorch bf16": lambda queries, k: search(half, queries, k),
        }

    def _faiss(self) -> dict[str, Method]:
        import faiss

        faiss.omp_set_num_threads(self.threads)
        d = self.single.shape[1]
        flat = faiss.IndexFlatIP(d)
        half = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        half.train(self.single[:1])
        for index in (flat, half):
            index.add(self.single)
        return {
            "faiss flat fp32": lambda queries, k: flat.search(queries, min(k, flat.ntotal)),
            "faiss SQ fp16": lambda queries, k: half.search(queries, min(k, half.ntotal)),
        }

    def _usearch(self) -> dict[str, Method]:
        from usearch.compiled import MetricKind
        from usearch.index import search

        rows = self.half
        return {
            "usearch exact fp16": lambda queries, k: search(
                rows, queries.astype(np.float16), k, MetricKind.IP, exact=True, threads=self.threads
            )
        }


def run(cases: list[Case], seconds: float, threads: int) -> Iterator[dict[str, Any]]:
    """Yield the times of each case: median and least seconds of every method, and the bandwidth in GB/s."""
    ready: Table | None = None
    for case in sorted(cases):
        if ready is None or ready.single.shape != (case.n, case.d):
            ready = None  # gives the memory back before the next table takes it
            ready = Table(case.n, case.d, threads)
            for name, hint in ready.missing.items():
                print(f"left out: {name}: {hint}")
        queries = np.random.default_rng(1).standard_normal((case.m, case.d)).astype(np.float32)
        times = turns(ready.methods, queries, case.k, seconds)
        bandwidth = ready.half.nbytes / float(np.median(times[READ])) / 1e9
        yield {
            **case._asdict(),
            "read_gb_s": bandwidth,
            "seconds": {
                name: {"median": float(np.median(taken)), "least": min(taken), "turns": len(taken)}
                for name, taken in times.items()
            },
        }


def turns(
    methods: dict[str, Method], queries: npt.NDArray[np.float32], k: int, seconds: float
) -> dict[str, list[float]]:
    """Return the seconds that each method took at each of its turns, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for method in methods.values():
        method(queries, k)
    begin = time.perf_counter()
    for turn in range(_MOST_TURNS):
        if turn >= _FEWEST_TURNS and time.perf_counter() - begin > seconds * len(methods):
            break
        for name, method in methods.items():
            time.sleep(_PAUSE)
            times[name].append(take_turn(method, queries, k))
    return times


def take_turn(method: Method, queries: npt.NDArray[np.float32], k: int) -> float:
    """Return the seconds of a call, or the median of several where a call is quick."""
    taken = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        method(queries, k)
        taken.append(time.perf_counter() - start)
        if taken[0] > _QUICK:
            return taken[0]
    return float(np.median(taken[_CALLS // 4 :]))


def report(results: dict[str, Any]) -> str:
    """Return the Markdown tables of the results."""
    about = results["machine"]
    lines = [
        f"# Cosine top-k on {about['cpu']}\n",
        f"{about['date']}, commit {about['commit']}, {results['threads']} threads, "
        f"kernel {results['kernel']}, "
        + ", ".join(f"{name} {version}" for name, version in about["packages"].items() if name in _PACKAGES)
        + ". Rows of length 1 and random direction. Medians of turns taken in one run. A figure with x says "
        "how many times as long as ours on fp16 rows a method takes; share is the bandwidth of ours, over "
        "that of only reading the fp16 rows, in the same turns.\n",
    ]
    names = [name for name in results["cases"][0]["seconds"] if name not in (READ, OURS[1])]
    header = ["n", "d", "m", "k", "ours fp16", "read", "share", *names]
    rows = []
    for case in results["cases"]:
        median = {name: figures["median"] for name, figures in case["seconds"].items()}
        ours = median[OURS[1]]
        ratios = [f"{median[name] / ours:.2f} x" if name in median else "" for name in names]
        sizes = [f"{case[name]:,}" for name in ("n", "d", "m", "k")]
        read = share = ""
        if 2 * case["n"] * case["d"] > _BEYOND_CACHES:
            read = f"{case['read_gb_s']:.1f} GB/s"
            share = f"{100 * median[READ] / ours:.0f} %" if case["m"] == 1 else ""
        rows.append([*sizes, duration(ours), read, share, *ratios])
    return "\n".join(lines) + table(header, rows)


def duration(seconds: float) -> str:
    """Return a time in microseconds or milliseconds."""
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.1f} ms"


def main() -> None:
    """Measure the cases asked for and write `kernels.json` and `kernels.md`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes: dict[str, list[int]] = {
        "rows": [256, 1024, 65_536, 1_000_000],  # 10,000,000 where there are 100 GB for all the forms
        "widths": [512, 768],
        "queries": [1, 16, 256],
        "best": [16, 64],
    }
    for name, values in sizes.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values)
    parser.add_argument("--threads", type=int, default=2, help="for every method")
    parser.add_argument("--seconds", type=float, default=1.0, help="per method and case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    asked = parser.parse_args()
    cases = [Case(*sizes) for sizes in product(asked.rows, asked.widths, asked.queries, asked.best)]
    folder = machine_folder(asked.out)
    results: dict[str, Any] = {
        "machine": describe(),
        "threads": asked.threads,
        "kernel": kernel_names()[0],
        "cases": [],
    }
    for case in run(cases, asked.seconds, asked.threads):
        results["cases"].append(case)
        print({name: case[name] for name in Case._fields}, flush=True)
        (folder / "kernels.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (folder / "kernels.md").write_text(report(results), encoding="utf-8")
    print(folder / "kernels.md")


if __name__ == "__main__":
    main()
