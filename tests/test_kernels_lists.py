"""Cosine top-k over lists of rows, over rows of length 1, and into the caller's arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geoengine.kernels import _topk_cpu, cosine_topk, kernel_names, reference

BOTH = pytest.mark.parametrize("topk", [cosine_topk, reference.cosine_topk], ids=["compiled", "reference"])


@st.composite
def lists(draw: st.DrawFn) -> dict[str, object]:
    """A call with a list of rows for each query, some empty, some naming a row twice."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, d, m = draw(st.integers(1, 60)), draw(st.integers(1, 40)), draw(st.integers(0, 7))
    lengths = rng.integers(0, 50, m) * (rng.random(m) < 0.8)
    embeddings = rng.standard_normal((n, d)).astype(draw(st.sampled_from([np.float32, np.float16])))
    return {
        "embeddings": embeddings,
        "queries": rng.standard_normal((m, d)).astype(np.float32),
        "k": draw(st.integers(1, 60)),
        "rows": rng.integers(0, n, lengths.sum()).astype(draw(st.sampled_from([np.int64, np.int32]))),
        "segments": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "normalized": draw(st.booleans()),
    }


def same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    return a[0].tobytes() == b[0].tobytes() and np.array_equal(a[1], b[1])


@given(lists(), st.sampled_from([None, 1, 3]))
def test_each_list_gives_what_a_call_of_its_own_would(call, threads):
    scores, indices = cosine_topk(**call, threads=threads)
    segments, width = call["segments"], scores.shape[1]
    lengths = np.diff(segments)
    assert width == min(call["k"], lengths.max(initial=0))
    for i, length in enumerate(lengths):
        taken = call["embeddings"][call["rows"][segments[i] : segments[i + 1]]]
        alone = cosine_topk(taken, call["queries"][i : i + 1], call["k"], normalized=call["normalized"])
        kept = min(width, length)
        assert same(alone, (scores[i : i + 1, :kept], indices[i : i + 1, :kept]))
        assert (scores[i, kept:] == -np.inf).all()
        assert (indices[i, kept:] == -1).all()


@given(lists())
def test_agrees_with_the_reference(call):
    scores, indices = cosine_topk(**call)
    expected_scores, expected_indices = reference.cosine_topk(**call)
    np.testing.assert_allclose(scores, expected_scores, rtol=2e-6, atol=2e-6)
    assert np.array_equal(indices == -1, expected_indices == -1)


@given(lists())
def test_every_kernel_gives_the_same_bits(call):
    call["rows"] = call["rows"].astype(np.int64)
    expected = cosine_topk(**call)
    for name in kernel_names():
        assert same(_topk_cpu.cosine_topk(**call, kernel=name), expected)


@BOTH
def test_rows_alone_are_one_list_for_all_queries(topk):
    embeddings = np.array([[1, 0], [0, 1], [1, 1], [-1, 0]], np.float32)
    queries = np.array([[1, 0], [0, 1]], np.float32)
    rows = np.array([3, 2, 2, 0])
    scores, indices = topk(embeddings, queries, 3, rows=rows)
    assert indices.tolist() == [[3, 1, 2], [1, 2, 0]]
    np.testing.assert_allclose(
        scores, [[1, 0.5**0.5, 0.5**0.5], [0.5**0.5, 0.5**0.5, 0]], rtol=1e-6, atol=1e-7
    )
    assert [part.shape for part in topk(embeddings, queries, 3, rows=rows[:0])] == [(2, 0), (2, 0)]


@BOTH
def test_segments_alone_cut_the_embeddings(topk):
    embeddings = np.array([[1, 0], [0, 1], [1, 1], [-1, 0]], np.float32)
    queries = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    scores, indices = topk(embeddings, queries, 9, segments=np.array([0, 1, 1, 4], np.int32))
    assert indices.tolist() == [[0, -1, -1], [-1, -1, -1], [0, 1, 2]]
    assert scores[:2].tolist() == [[1, -np.inf, -np.inf], [-np.inf] * 3]


@BOTH
def test_normalized_rows_are_not_divided_and_not_clamped(topk):
    embeddings = np.array([[3, 0], [0, 1], [-2, 0], [0, 0]], np.float32)
    scores, indices = topk(embeddings, np.array([[10, 0], [0, 0]], np.float32), 4, normalized=True)
    assert indices.tolist() == [[0, 1, 3, 2], [0, 1, 2, 3]]
    assert scores.tolist() == [[3, 0, 0, -2], [0, 0, 0, 0]]


@BOTH
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_rows_that_are_scored_must_be_finite(topk, normalized, value):
    rng = np.random.default_rng(0)
    embeddings, queries = rng.standard_normal((30, 20)).astype(np.float32), np.ones((2, 20), np.float32)
    embeddings[11, 19] = value
    rows = np.array([4, 29, 11, 3])
    segments = np.array([0, 1, 4])
    topk(embeddings, queries, 2, rows=rows[:2], normalized=normalized)
    for photos, cuts in ((queries, segments), (queries, None), (queries[:0], None), (queries * 0, None)):
        with pytest.raises(ValueError, match=r"^embeddings must be finite, got NaN or infinity in row 11$"):
            topk(embeddings, photos, 2, rows=rows, segments=cuts, normalized=normalized)


@BOTH
def test_out_is_written_and_returned(topk):
    rng = np.random.default_rng(1)
    embeddings, queries = rng.standard_normal((2, 9, 5)).astype(np.float32)
    expected = topk(embeddings, queries, 4)
    out = (np.full((9, 4), 7, np.float32), np.full((9, 4), 7, np.int64))
    answer = topk(embeddings, queries, 4, out=out)
    assert answer[0] is out[0]
    assert answer[1] is out[1]
    assert same(out, expected)


def good(**changes: object) -> dict[str, object]:
    return {
        "embeddings": np.ones((4, 3), np.float32),
        "queries": np.ones((2, 3), np.float32),
        "k": 2,
        "rows": np.array([0, 3, 1]),
    } | changes


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (good(rows=[0]), TypeError, "rows must be a NumPy array or an array with .*, got list"),
        (good(rows=np.ones(2)), TypeError, "rows must be int64 or int32, got float64"),
        (good(rows=np.zeros((1, 2), int)), ValueError, r"rows must have one dimension, got shape \(1, 2\)"),
        (
            good(rows=np.array([0, 4])),
            IndexError,
            r"rows must be row numbers of embeddings, in \[0, 4\), got 4 at position 1",
        ),
        (
            good(rows=np.array([0, 3, -1, 9], np.int32)),
            IndexError,
            r"rows must be row numbers of embeddings, in \[0, 4\), got -1 at position 2",
        ),
        (good(segments=(0, 3)), TypeError, "segments must be a NumPy array or an array with .*, got tuple"),
        (good(segments=np.zeros(3, np.uint8)), TypeError, "segments must be int64 or int32, got uint8"),
        (good(segments=np.array([0, 3])), ValueError, r"segments must hold m \+ 1 = 3 positions, got 2"),
        (
            good(segments=np.array([0, 1, 2])),
            ValueError,
            "segments must run from 0 to 3, the number of candidates, got 0 to 2",
        ),
        (
            good(rows=None, segments=np.array([1, 1, 4])),
            ValueError,
            "segments must run from 0 to 4, the number of candidates, got 1 to 4",
        ),
        (
            good(segments=np.array([0, 4, 3])),
            ValueError,
            "segments must not descend, got 4 and then 3 at position 2",
        ),
        (good(normalized=1), TypeError, "normalized must be True or False, got int"),
        (good(out=[1, 2]), TypeError, r"out must be a tuple \(scores, indices\), got list"),
        (
            good(out=(np.ones((2, 2)), np.ones((2, 2), int))),
            TypeError,
            "out scores must be a NumPy array of float32, got float64",
        ),
        (
            good(out=(np.ones((2, 2), np.float32), np.ones((2, 3), int))),
            ValueError,
            r"out indices must have shape \(2, 2\), got \(2, 3\)",
        ),
        (
            good(out=(np.ones((2, 4), np.float32)[:, ::2], np.ones((2, 2), int))),
            ValueError,
            "out scores must be C-contiguous, aligned and writeable",
        ),
    ],
)
def test_bad_arguments_are_named(topk, arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        topk(**arguments)


def test_a_row_number_past_many_good_ones_is_named_by_any_number_of_threads():
    embeddings = np.ones((10, 64), np.float32)
    rows = np.zeros(50_000, np.int64)
    rows[40_001:] = 10
    for threads in (None, 1, 4):
        with pytest.raises(IndexError, match=r"got 10 at position 40001$"):
            cosine_topk(embeddings, embeddings[:1], 3, rows=rows, threads=threads)
