"""Cosine top-k over bfloat16 and int8, arrays of other libraries, and more than 2^31 elements."""

import gc
import weakref

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geoengine.kernels import Int8Rows, _topk_cpu, cosine_topk, kernel_names, quantize_rows, reference

BOTH = pytest.mark.parametrize("topk", [cosine_topk, reference.cosine_topk], ids=["compiled", "reference"])


def same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    return a[0].tobytes() == b[0].tobytes() and np.array_equal(a[1], b[1])


def made(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_bfloat16(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).to(torch.bfloat16)


@pytest.mark.parametrize("d", [1, 8, 15, 16, 33, 100])
@pytest.mark.parametrize("normalized", [True, False])
def test_bfloat16_scores_as_the_same_values_in_single(d, normalized):
    rows, queries = to_bfloat16(made(0, 200, d)), to_bfloat16(made(1, 5, d))
    expected = cosine_topk(rows.float().numpy(), queries.float().numpy(), 20, normalized=normalized)
    assert same(cosine_topk(rows, queries, 20, normalized=normalized), expected)
    for name in kernel_names():
        bits = rows.view(torch.uint16).numpy()
        answer = _topk_cpu.cosine_topk(
            bits, queries.float().numpy(), 20, normalized=normalized, bfloat16=True, kernel=name
        )
        assert same(answer, expected)


def test_bfloat16_of_ml_dtypes():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rows, queries = made(0, 60, 24).astype(bfloat16), made(1, 3, 24).astype(bfloat16)
    expected = cosine_topk(rows.astype(np.float32), queries.astype(np.float32), 9)
    assert same(cosine_topk(rows, queries, 9), expected)
    assert same(
        cosine_topk(rows[:, 2:20], queries[:, 2:20], 9),
        cosine_topk(rows[:, 2:20].copy(), queries[:, 2:20], 9),
    )


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 90), st.booleans())
def test_int8_rows_score_as_scale_times_values(seed, n, d, normalized):
    rng = np.random.default_rng(seed)
    values = rng.integers(-128, 128, (n, d)).astype(np.int8)
    values[rng.random(n) < 0.1] = 0
    scales = rng.standard_normal(n).astype(np.float32) * (rng.random(n) < 0.9)
    queries = rng.standard_normal((3, d)).astype(np.float32)
    rows = Int8Rows(values, scales)
    answer = cosine_topk(rows, queries, n, normalized=normalized)
    for name in kernel_names():
        again = _topk_cpu.cosine_topk(values, queries, n, normalized=normalized, scales=scales, kernel=name)
        assert same(again, answer)
    expected = reference.cosine_topk(rows, queries, n, normalized=normalized)
    size = np.abs(expected[0]).max() if normalized else 1
    np.testing.assert_allclose(answer[0], expected[0], rtol=0, atol=2e-6 * max(size, 1))


@BOTH
@pytest.mark.parametrize("normalized", [True, False])
def test_int8_scales_must_be_finite(topk, normalized):
    rows = Int8Rows(np.ones((3, 4), np.int8), np.array([1, np.nan, np.inf], np.float32))
    with pytest.raises(ValueError, match=r"^embeddings must be finite, got NaN or infinity in row 1$"):
        topk(rows, np.ones((1, 4), np.float32), 1, normalized=normalized)


def test_quantized_rows_are_as_near_as_they_say():
    table = made(2, 300, 65) * 10.0 ** np.random.default_rng(3).uniform(-6, 6, (300, 1))
    table[::7] = 0
    for rows in (
        table.astype(np.float32),
        (table / 1e4).astype(np.float16),
        to_bfloat16(table.astype(np.float32)),
    ):
        quantized = quantize_rows(rows)
        values = rows.double().numpy() if isinstance(rows, torch.Tensor) else rows.astype(np.float64)
        difference = values - quantized.scales[:, None].astype(np.float64) * quantized.values
        distance = np.sqrt((difference**2).sum(axis=1))
        assert (distance <= quantized.errors).all()
        assert (quantized.errors <= distance * 1.001 + 1e-30).all()
        assert (quantized.errors <= quantized.scales * 0.51 * 65**0.5).all()
        np.testing.assert_allclose(quantized.lengths, np.sqrt((values**2).sum(axis=1)), rtol=1e-6)
        assert abs(quantized.values).max() == 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_tensors_are_read_where_they_are(dtype):
    wide = torch.from_numpy(made(4, 50, 40)).to(dtype)
    rows, queries = wide[5:, 3:30], torch.from_numpy(made(5, 4, 27))
    lists = torch.tensor([4, 3, 44, 4, 0]), torch.tensor([0, 2, 2, 4, 5], dtype=torch.int32)
    expected = cosine_topk(
        rows.float().numpy().copy(), queries.numpy(), 3, rows=lists[0].numpy(), segments=lists[1].numpy()
    )
    answer = cosine_topk(rows, queries, 3, rows=lists[0], segments=lists[1])
    assert [type(part) for part in answer] == [np.ndarray, np.ndarray]
    assert same(answer, expected)


def test_ort_values_are_read_where_they_are():
    rows, queries = made(6, 30, 20).astype(np.float16), made(7, 2, 20)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(rows)
    assert same(cosine_topk(value, queries, 5), cosine_topk(rows, queries, 5))


def test_memory_taken_over_is_given_back():
    rows = to_bfloat16(made(8, 10, 16))
    gone = weakref.ref(rows)
    cosine_topk(rows, rows, 2)
    del rows
    gc.collect()
    assert gone() is None


def test_dlpack_capsules_are_used_once_and_checked():
    capsule = torch.ones(2, 3).__dlpack__()
    owner, pointer, *rest = _topk_cpu.read_dlpack(capsule)
    assert rest == [(2, 3), (3, 1), 2, 32, 1, 0]
    for refused in (capsule, object()):
        with pytest.raises((ValueError, TypeError)):
            _topk_cpu.read_dlpack(refused)
    del owner
    assert pointer


@BOTH
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"embeddings": torch.ones(3, 4, dtype=torch.float64)},
            TypeError,
            "embeddings must be .*, got float64",
        ),
        (
            {"embeddings": np.ones((3, 4), np.int8)},
            TypeError,
            r".*need a scale .* Int8Rows\(values, scales\)",
        ),
        ({"queries": np.ones((3, 4), np.int8)}, TypeError, r"queries of int8 .*"),
        (
            {"queries": Int8Rows(np.ones((3, 4), np.int8), np.ones(3))},
            TypeError,
            "queries must .*got Int8Rows",
        ),
        (
            {"embeddings": Int8Rows(np.ones((3, 4)), np.ones(3))},
            TypeError,
            ".*values must be int8, got float64",
        ),
        (
            {"embeddings": Int8Rows(np.ones((3, 4), np.int8), np.ones(3))},
            TypeError,
            "embeddings.scales must be float32, got float64",
        ),
        (
            {"embeddings": Int8Rows(np.ones((3, 4), np.int8), np.ones(2, np.float32))},
            ValueError,
            r"embeddings.scales must have shape \(3,\), one for each row, got \(2,\)",
        ),
        ({"rows": torch.tensor([1.0])}, TypeError, "rows must be int64 or int32, got float32"),
        ({"scan": 3}, TypeError, "scan must be Int8Rows, got int"),
        (
            {"scan": Int8Rows(np.ones((3, 4), np.int8), np.ones(3, np.float32))},
            ValueError,
            r"scan must come from quantize_rows\(embeddings\): .*",
        ),
        ({"scan": quantize_rows(np.ones((2, 4), np.float32))}, ValueError, r"scan must have the shape .*"),
        (
            {
                "embeddings": Int8Rows(np.ones((3, 4), np.int8), np.ones(3, np.float32)),
                "scan": quantize_rows(np.ones((3, 4), np.float32)),
            },
            ValueError,
            "scan speeds up embeddings of floats.*",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named(topk, changes, error, message):
    good = {"embeddings": np.ones((3, 4), np.float32), "queries": np.ones((3, 4), np.float32), "k": 2}
    with pytest.raises(error, match=f"^{message}$"):
        topk(**good | changes)


def test_quantize_rows_names_what_it_refuses():
    with pytest.raises(ValueError, match=r"^embeddings must be finite, got NaN or infinity in row 2$"):
        quantize_rows(np.array([[1], [2], [np.inf]], np.float32))
    with pytest.raises(TypeError, match=r"^embeddings must be float32, float16 or bfloat16, got int8$"):
        quantize_rows(np.ones((2, 2), np.int8))
    with pytest.raises(ValueError, match=r"numpy.ascontiguousarray\(embeddings\)$"):
        quantize_rows(np.ones((2, 4), np.float32)[:, ::2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_arrays_beyond_2_31_elements(tmp_path, dtype):
    # A file with holes takes no room; what is read of it is few rows, at both ends.
    n, d = 2**22 + 9, 512
    rows = np.memmap(tmp_path / "rows", dtype, "w+", shape=(n, d))
    assert rows.size > 2**31
    ends = np.array([0, 1, n // 2, 2**22 - 1, 2**22, n - 2, n - 1])
    values = made(9, len(ends), d).astype(dtype)
    rows[ends] = values
    queries = made(10, 2, d)
    assert same(cosine_topk(rows, queries, 5, rows=ends), cosine_topk(values, queries, 5))
    sparse = np.lib.stride_tricks.as_strided(
        rows, ((n - 1) // 2**21 + 1, d), (2**21 * d * rows.itemsize, rows.itemsize)
    )
    assert same(cosine_topk(sparse, queries, 2), cosine_topk(rows[:: 2**21].copy(), queries, 2))
