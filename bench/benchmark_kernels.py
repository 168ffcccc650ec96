"""Cosine top-k beside its peers under pytest-benchmark: `pytest bench`; more cases are in `bench.kernels`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from geoengine.bench.kernels import OURS, READ, Table

_TABLES: dict[tuple[int, int], Table] = {}


@pytest.mark.parametrize(
    "method", [READ, *OURS, "NumPy fp32", "PyTorch fp32", "PyTorch bf16", "faiss flat fp32"]
)
@pytest.mark.benchmark(max_time=0.1, min_rounds=3)
@pytest.mark.parametrize("k", [16])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(("n", "d"), [(256, 512), (65_536, 512)])
def test_search(benchmark: Any, method: str, n: int, d: int, m: int, k: int) -> None:  # noqa: ANN401
    """Time one method on one case."""
    if (n, d) not in _TABLES:
        _TABLES.clear()
        _TABLES[n, d] = Table(n, d, threads=2)
    methods = _TABLES[n, d].methods
    if method not in methods:
        pytest.skip(f"{method} is not installed: pip install .[bench]")
    queries = np.random.default_rng(1).standard_normal((m, d)).astype(np.float32)
    benchmark.group = f"{n} x {d}, {m} queries, {k} best"
    benchmark(methods[method], queries, k)
