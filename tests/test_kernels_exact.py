"""Exactness: against sums in float64, and of the two-stage search against the full scan, bit by bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geoengine.kernels import _topk_cpu, cosine_topk, kernel_names, quantize_rows


def same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    return a[0].tobytes() == b[0].tobytes() and np.array_equal(a[1], b[1])


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Rows and queries of the kinds that embeddings come in, and of those that are hard to bound."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, d = draw(st.integers(1, 400)), draw(st.integers(1, 100))
    rows = rng.standard_normal((n, d))
    queries = rng.standard_normal((draw(st.integers(1, 4)), d))
    kinds = ["plain", "clustered", "outlier", "duplicates", "integers", "lengths", "near ties"]
    kind = draw(st.sampled_from([*kinds, "aligned"]))
    if kind == "clustered":
        rows = rows * 0.05 + rng.standard_normal(d)
        queries = queries * 0.3 + rows[0]
    elif kind == "outlier":
        rows[:, rng.integers(d)] += 40
        queries[:, rng.integers(d)] -= 40
    elif kind == "duplicates":
        rows = rows[rng.integers(0, max(n // 10, 1), n)]
    elif kind == "integers":
        rows, queries = rng.integers(-1, 2, rows.shape), rng.integers(-1, 2, queries.shape)
    elif kind == "lengths":
        rows = rows * 10.0 ** rng.uniform(-44, 37, (n, 1))
    elif kind == "aligned":  # rounding takes from each row what the query would see most of
        sign = np.sign(queries[0])
        rows = np.round(rows[:1] * 30).clip(-120, 120) + sign * rng.uniform(-0.49, 0.49, (n, 1))
        rows[:, 0], queries[0] = 127, sign
    elif kind == "near ties":
        rows = rows[:1] * rng.uniform(0.5, 2, (n, 1)) * (1 + 1e-6 * rows)
    rows[rng.random(n) < 0.05] = 0
    dtype = (
        draw(st.sampled_from([np.float32, np.float16]))
        if kind not in ("lengths", "multiples")
        else np.float32
    )
    return rows.astype(dtype), queries.astype(np.float32)


@given(tables(), st.integers(1, 40), st.booleans(), st.sampled_from([None, 1, 3]))
def test_a_look_in_int8_first_changes_no_bit(table, k, normalized, threads):
    rows, queries = table
    expected = cosine_topk(rows, queries, k, normalized=normalized, threads=1)
    scan = quantize_rows(rows)
    assert same(cosine_topk(rows, queries, k, normalized=normalized, scan=scan, threads=threads), expected)


@given(tables(), st.integers(1, 20))
def test_every_kernel_looks_at_int8_alike(table, k):
    rows, queries = table
    expected = cosine_topk(rows, queries, k)
    scan = quantize_rows(rows)
    for name in kernel_names():
        assert same(_topk_cpu.cosine_topk(rows, queries, k, scan=scan, kernel=name), expected)


@given(tables(), st.integers(1, 20), st.integers(0, 2**32))
def test_a_look_in_int8_first_serves_lists_too(table, k, seed):
    rows, queries = table
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 300, len(queries))
    lists = {
        "rows": rng.integers(0, len(rows), lengths.sum()),
        "segments": np.concatenate([[0], np.cumsum(lengths)]),
    }
    expected = cosine_topk(rows, queries, k, **lists)
    assert same(cosine_topk(rows, queries, k, **lists, scan=quantize_rows(rows)), expected)


def test_a_look_allows_for_the_rounding_of_query_and_scores():
    # Multiples of one row that int8 holds without error: tied but for the rounding of their scores, and all
    # seen too low or too high by the rounding of the query.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        row = rng.integers(-120, 121, 64)
        row[0] = 127
        rows = (row * rng.integers(1, 4096, (1000, 1))).astype(np.float32)
        scan = quantize_rows(rows)
        assert not scan.errors.any()
        queries = rng.standard_normal((4, 64)).astype(np.float32)
        queries += row * np.float32(rng.choice([0, 0.01]))
        assert same(cosine_topk(rows, queries, 8, scan=scan), cosine_topk(rows, queries, 8))


@pytest.mark.parametrize("normalized", [True, False])
def test_most_rows_are_not_read_in_full(normalized):
    # NaN in a row that the look rules out is not seen: the proof that it is not read. One thread, since a
    # second knows no good rows yet where it begins.
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20_000, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[::100] = rows[0] + 0.01 * rows[::100]
    query = rows[:1]
    scan = quantize_rows(rows)
    expected = cosine_topk(rows, query, 16, normalized=normalized, scan=scan, threads=1)
    assert same(cosine_topk(rows, query, 16, normalized=normalized), expected)
    far = np.flatnonzero(rows @ query[0] < 0.5)
    rows[far[far > 10_000]] = np.nan
    assert same(cosine_topk(rows, query, 16, normalized=normalized, scan=scan, threads=1), expected)


def test_a_look_at_rows_too_wide_for_32_bits_is_left_out():
    rows = np.random.default_rng(1).standard_normal((40, 70_000)).astype(np.float32)
    assert same(cosine_topk(rows, rows[:2], 5, scan=quantize_rows(rows)), cosine_topk(rows, rows[:2], 5))
    wide = np.ones((20, 65_536), np.float32)
    wide[7] = -1
    assert cosine_topk(wide, -wide[:1], 1, scan=quantize_rows(wide))[1].tolist() == [[7]]


@given(tables(), st.integers(1, 40))
def test_indices_are_those_of_float64_where_the_gap_exceeds_the_rounding(table, k):
    rows, queries = table
    wide, photos = rows.astype(np.float64), queries.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        units = np.nan_to_num(wide / np.linalg.norm(wide, axis=1, keepdims=True))
        photos = np.nan_to_num(photos / np.linalg.norm(photos, axis=1, keepdims=True))
    exact = photos @ units.T
    scores, indices = cosine_topk(rows, queries, k)
    bound = 4 * (rows.shape[1] / 16 + 12) * 2.0**-24
    np.testing.assert_allclose(scores, np.take_along_axis(exact, indices, axis=1), rtol=0, atol=bound)
    for i, order in enumerate(np.argsort(-exact, axis=1, kind="stable")):
        ranked = exact[i, order]
        for place in range(indices.shape[1]):
            above = place == 0 or ranked[place - 1] - ranked[place] > 2 * bound
            below = place + 1 == len(ranked) or ranked[place] - ranked[place + 1] > 2 * bound
            if above and below:
                assert indices[i, place] == order[place]
