"""The compiled cosine top-k against its NumPy reference by value and k-th score, and its promises by bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geoengine.kernels import _topk_cpu, cosine_topk, kernel_names, reference

BOTH = pytest.mark.parametrize("topk", [cosine_topk, reference.cosine_topk], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float16])


def random_rows(rng: np.random.Generator, n: int, d: int, dtype=np.float32) -> np.ndarray:
    """Rows of random direction and length, about one in eight zero and one in eight a copy of another."""
    rows = rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-2, 2, (n, 1))
    rows[rng.random(n) < 0.125] = 0
    copies = np.flatnonzero(rng.random(n) < 0.125)
    rows[copies] = rows[rng.integers(0, max(n, 1), copies.size)]
    return rows.astype(dtype)


def assert_same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> None:
    """Equal bit by bit."""
    assert a[0].tobytes() == b[0].tobytes()
    assert np.array_equal(a[1], b[1])


def assert_exact_order(scores: np.ndarray, indices: np.ndarray) -> None:
    """Scores descend, and rows of equal score ascend."""
    for row_scores, row_indices in zip(scores, indices, strict=True):
        assert np.array_equal(np.lexsort((row_indices, -row_scores)), np.arange(len(row_scores)))
        assert len(set(row_indices.tolist())) == len(row_indices)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, d, m = draw(st.integers(0, 150)), draw(st.integers(1, 70)), draw(st.integers(0, 9))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    return random_rows(rng, n, d, dtype), random_rows(rng, m, d), draw(st.integers(1, n + 5))


@given(problems(), st.sampled_from([None, 1, 3]))
def test_agrees_with_the_reference_by_value_and_kth_score(problem, threads):
    embeddings, queries, k = problem
    scores, indices = cosine_topk(embeddings, queries, k, threads=threads)
    kept = min(k, len(embeddings))
    assert scores.shape == indices.shape == (len(queries), kept)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    assert_exact_order(scores, indices)

    expected_scores, _ = reference.cosine_topk(embeddings, queries, k)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-6)
    all_scores, all_indices = reference.cosine_topk(embeddings, queries, max(len(embeddings), 1))
    score_of_row = np.take_along_axis(all_scores, np.argsort(all_indices, axis=1), axis=1)
    chosen = np.take_along_axis(score_of_row, indices, axis=1)
    np.testing.assert_allclose(chosen, scores, rtol=0, atol=1e-6)
    assert (chosen >= expected_scores[:, -1:] - 2e-6).all()


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 12))
def test_ties_go_to_the_lower_index(seed, n, k):
    # Entries of -1, 0, 1 in three columns: few distinct directions, many exact ties.
    rng = np.random.default_rng(seed)
    embeddings = rng.integers(-1, 2, (n, 3)).astype(np.float32)
    queries = rng.integers(-1, 2, (4, 3)).astype(np.float32)
    scores, indices = cosine_topk(embeddings, queries, n)
    assert_exact_order(scores, indices)
    expected_scores, expected_indices = reference.cosine_topk(embeddings, queries, n)
    assert np.array_equal(indices, expected_indices)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=2e-7)
    fewer = cosine_topk(embeddings, queries, k, threads=2)
    assert_same(fewer, (np.ascontiguousarray(scores[:, :k]), indices[:, :k]))


@BOTH
@DTYPES
def test_golden_values(topk, dtype):
    embeddings = np.array([[0, 0], [2, 0], [0, 1], [3, 4], [-5, 0], [1, 0]], dtype)
    scores, indices = topk(embeddings, np.array([[10, 0], [0, 0]], np.float32), 6)
    assert indices.tolist() == [[1, 5, 3, 0, 2, 4], [0, 1, 2, 3, 4, 5]]
    np.testing.assert_allclose(scores, [[1, 1, 0.6, 0, 0, -1], [0, 0, 0, 0, 0, 0]], rtol=2e-7)


@BOTH
def test_threshold_survives_many_insertions(topk):
    # Ascending scores replace the whole beam again and again; descending ones never do.
    angles = np.linspace(0.1, 1.5, 1000, dtype=np.float32)
    rising = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    query = np.array([[1, 0]], np.float32)
    assert topk(rising, query, 3)[1].tolist() == [[999, 998, 997]]
    assert topk(rising[::-1].copy(), query, 3)[1].tolist() == [[0, 1, 2]]


@BOTH
def test_k_larger_than_n_and_empty_arrays(topk):
    rng = np.random.default_rng(0)
    embeddings, queries = random_rows(rng, 5, 8), random_rows(rng, 2, 8)
    assert_same(topk(embeddings, queries, 10**30), topk(embeddings, queries, 5))
    assert topk(embeddings[:0], queries, 3)[0].shape == (2, 0)
    assert topk(embeddings[:0], queries, 3)[1].shape == (2, 0)
    assert topk(embeddings, queries[:0], 3)[0].shape == (0, 3)
    scores, indices = topk(embeddings[:, :0], queries[:, :0], 3)
    assert scores.tolist() == [[0, 0, 0]] * 2
    assert indices.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("d", [1, 7, 15, 16, 17, 128, 512])
def test_half_rows_score_as_the_same_values_in_single(d):
    rng = np.random.default_rng(d)
    half, queries = random_rows(rng, 300, d, np.float16), random_rows(rng, 6, d)
    assert_same(cosine_topk(half, queries, 50), cosine_topk(half.astype(np.float32), queries, 50))


@DTYPES
def test_queries_may_be_half(dtype):
    rng = np.random.default_rng(1)
    embeddings, queries = random_rows(rng, 50, 24, dtype), random_rows(rng, 3, 24, np.float16)
    assert_same(cosine_topk(embeddings, queries, 9), cosine_topk(embeddings, queries.astype(np.float32), 9))


@DTYPES
def test_rows_apart_read_only_and_mapped_are_read_where_they_are(dtype, tmp_path):
    rng = np.random.default_rng(2)
    rows, queries = random_rows(rng, 90, 40, dtype), random_rows(rng, 5, 40)
    expected = cosine_topk(rows, queries, 20)
    wide = np.full((90, 57), np.nan, dtype)
    wide[:, 9:49] = rows
    spaced = np.repeat(rows, 3, axis=0)[1::3]
    rows.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", dtype, "r", shape=rows.shape)
    for variant in (wide[:, 9:49], spaced, mapped):
        assert_same(cosine_topk(variant, np.asfortranarray(queries), 20), expected)
        assert np.array_equal(variant, rows)
    assert_same(cosine_topk(rows, queries[:, ::-1].copy()[:, ::-1], 20), expected)


@BOTH
@DTYPES
def test_rows_that_would_have_to_be_copied_are_refused(topk, dtype):
    rows = np.ones((6, 8), dtype)
    unaligned = np.frombuffer(b"\0" + rows.tobytes(), np.uint8)[1:].view(dtype).reshape(rows.shape)
    broadcast = np.broadcast_to(rows[:1], rows.shape)
    for variant in (rows[:, ::2], np.asfortranarray(rows), rows[::-1], unaligned, broadcast):
        with pytest.raises(ValueError, match=r"^embeddings must be aligned, .* numpy.ascontiguousarray"):
            topk(variant, np.ones((1, variant.shape[1]), dtype), 1)


@BOTH
@pytest.mark.parametrize("scale", [1e-44, 1e-37, 1e-22, 1e-20, 1e-9, 1e9, 1e18, 1e37])
def test_length_does_not_matter_even_where_squares_overflow(topk, scale):
    rng = np.random.default_rng(3)
    directions = rng.integers(-9, 10, (40, 30)).astype(np.float32)
    query = directions[7:8]
    scaled = (directions * np.float32(scale)).astype(np.float32)
    expected = reference.cosine_topk(scaled.astype(np.float64).astype(np.float32), query, 40)
    for scores, indices in (topk(scaled, query, 40), topk(scaled, query * np.float32(2.0**100), 40)):
        assert indices[0, 0] == 7
        np.testing.assert_allclose(scores, expected[0], rtol=0, atol=1e-6)
    scores, indices = topk(directions, scaled[7:8], 1)
    assert indices.tolist() == [[7]]
    np.testing.assert_allclose(scores, 1, atol=0.1 if scale == 1e-44 else 1e-6)


@given(problems(), st.integers(1, 9))
def test_thread_count_changes_no_bit(problem, threads):
    embeddings, queries, k = problem
    assert_same(
        cosine_topk(embeddings, queries, k, threads=threads), cosine_topk(embeddings, queries, k, threads=1)
    )


def test_thread_count_changes_no_bit_where_threads_are_chosen_automatically():
    rng = np.random.default_rng(4)
    embeddings, queries = random_rows(rng, 40_000, 64), random_rows(rng, 11, 64)
    expected = cosine_topk(embeddings, queries, 100, threads=1)
    for threads in (None, 2, 7, 10**9):
        assert_same(cosine_topk(embeddings, queries, 100, threads=threads), expected)


@given(problems())
def test_other_queries_in_the_call_change_no_bit(problem):
    embeddings, queries, k = problem
    scores, indices = cosine_topk(embeddings, queries, k)
    for i in range(len(queries)):
        assert_same(cosine_topk(embeddings, queries[i : i + 1], k), (scores[i : i + 1], indices[i : i + 1]))


@given(problems())
def test_every_kernel_gives_the_same_bits(problem):
    embeddings, queries, k = problem
    expected = _topk_cpu.cosine_topk(embeddings, queries, k, threads=1, kernel="portable")
    for name in kernel_names():
        assert_same(_topk_cpu.cosine_topk(embeddings, queries, k, threads=1, kernel=name), expected)


def test_every_kernel_reads_every_half_value():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    embeddings = np.stack([values, np.ones_like(values)], axis=1)
    query = np.array([[1, 0]], np.float32)
    expected = reference.cosine_topk(embeddings, query, len(values))[0]
    for name in kernel_names():
        scores, indices = _topk_cpu.cosine_topk(embeddings, query, len(values), kernel=name)
        np.testing.assert_allclose(scores, expected, rtol=3e-7, atol=0)
        cosines = values.astype(np.float64) / np.hypot(values.astype(np.float64), 1)
        np.testing.assert_allclose(scores[0], cosines[indices[0]], rtol=3e-7, atol=0)


@BOTH
@DTYPES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(topk, dtype, value):
    rng = np.random.default_rng(5)
    embeddings, queries = random_rows(rng, 200, 21, dtype), random_rows(rng, 6, 21)
    embeddings[[60, 150], [20, 0]] = value
    for threads in (None, 1, 4):
        with pytest.raises(ValueError, match=r"embeddings must be finite, got NaN or infinity in row 60$"):
            topk(embeddings, queries, 1, threads=threads)
    with pytest.raises(ValueError, match=r"embeddings must be finite, got NaN or infinity in row 60$"):
        topk(embeddings, queries[:0], 1)
    queries[4, 3] = value
    with pytest.raises(ValueError, match=r"queries must be finite, got NaN or infinity in row 4$"):
        topk(embeddings, queries, 1)


def test_the_lowest_bad_row_is_named_by_any_number_of_threads():
    # Threads take 1024 rows at a time: one meets its bad row last, the others theirs at once. The slowest
    # kernel leaves all threads time to start.
    embeddings = np.ones((20_000, 64), np.float32)
    embeddings[3071] = np.nan
    embeddings[3072::1024] = np.nan
    for _ in range(20):
        with pytest.raises(ValueError, match=r"in row 3071$"):
            _topk_cpu.cosine_topk(embeddings, embeddings[:8], 1, threads=4, kernel="portable")


def good(**changes: object) -> dict[str, object]:
    return {
        "embeddings": np.ones((4, 3), np.float32),
        "queries": np.ones((2, 3), np.float32),
        "k": 2,
        "threads": 1,
    } | changes


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            good(embeddings=[[1.0]]),
            TypeError,
            "embeddings must be a NumPy array or an array with .*, got list",
        ),
        (good(queries=None), TypeError, "queries must be a NumPy array or an array with .*, got NoneType"),
        (
            good(embeddings=np.ones((4, 3))),
            TypeError,
            "embeddings must be float32, float16 or bfloat16, got float64",
        ),
        (
            good(queries=np.ones((2, 3), int)),
            TypeError,
            "queries must be float32, float16 or bfloat16, got int64",
        ),
        (
            good(embeddings=np.ones((4, 3), ">f4")),
            TypeError,
            "embeddings must be float32, float16 or bfloat16, got >f4",
        ),
        (
            good(embeddings=np.ones(3, np.float32)),
            ValueError,
            r"embeddings must have two dimensions \(rows, d\), got shape \(3,\)",
        ),
        (
            good(queries=np.ones((1, 2, 3), np.float16)),
            ValueError,
            r"queries must have two dimensions \(rows, d\), got shape \(1, 2, 3\)",
        ),
        (
            good(queries=np.ones((2, 5), np.float32)),
            ValueError,
            r"queries must be \[m, 3\] like embeddings of shape \(4, 3\), got shape \(2, 5\)",
        ),
        (good(k=0), ValueError, "k must be at least 1, got 0"),
        (good(k=-(2**70)), ValueError, "k must be at least 1, got -1180591620717411303424"),
        (good(k=2.0), TypeError, "k must be an integer, got float"),
        (good(threads=0), ValueError, "threads must be at least 1, got 0"),
        (good(threads="2"), TypeError, "threads must be an integer, got str"),
    ],
)
def test_bad_arguments_are_named(topk, arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        topk(**arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"embeddings": np.ones((4, 3))},
        {"embeddings": np.ones((4, 3), ">f2")},
        {"embeddings": np.ones((4, 3), np.uint16)},
        {"embeddings": np.ones((4, 3), np.int8)},
        {"embeddings": np.ones((3, 4), np.float32).T},
        {"embeddings": [[1.0] * 3]},
        {"queries": np.ones((2, 3), np.float16)},
        {"queries": np.ones(3, np.float32)},
        {"queries": np.ones((2, 4), np.float32)},
        {"queries": np.ones((3, 2), np.float32).T},
        {"k": 0},
        {"k": 1.0},
        {"k": True},
        {"k": 2**64},
        {"threads": -1},
        {"rows": np.zeros(2, np.int32)},
        {"rows": np.zeros((1, 2), np.int64)},
        {"rows": np.zeros(4, np.int64)[::2]},
        {"rows": [0]},
        {"segments": np.array([0, 4])},
        {"segments": np.array([0, 5, 4])},
        {"segments": np.array([0, 2, 5])},
        {"segments": np.array([1, 2, 4])},
        {"normalized": 1},
        {"out": [np.empty((2, 2), np.float32), np.empty((2, 2), np.int64)]},
        {"out": (np.empty((2, 2), np.float32), np.empty((2, 2), np.int32))},
        {"out": (np.empty((2, 2), np.float32), np.empty((2, 3), np.int64))},
        {"out": (np.empty((2, 2), np.float32), np.empty((2, 4), np.int64)[:, ::2])},
    ],
    ids=str,
)
def test_the_extension_takes_nothing_that_would_not_be_memory_safe(changes):
    assert _topk_cpu.cosine_topk(**good()) is not None
    assert _topk_cpu.cosine_topk(**good(**changes)) is None


def test_the_extension_knows_no_other_kernels():
    with pytest.raises(ValueError, match='this processor has no kernel "abacus"'):
        _topk_cpu.cosine_topk(**good(kernel="abacus"))
