"""Cosine top-k problems for the CUDA kernels, their answers in float64, and what makes an answer right."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TYPES = ["float32", "float16", "bfloat16", "int8"]
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values, rounded to nearest; infinities stay."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((bits & 0x7F800000) == 0x7F800000, bits >> 16, rounded).astype(np.uint16)


def from_stored(stored: np.ndarray, kind: str) -> np.ndarray:
    """The values in float64 of an array of `kind`; bfloat16 is held as its bits."""
    if kind == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


@dataclass(kw_only=True)
class Problem:
    """One call: packed arrays, and how the rows shall lie in memory."""

    kind: str
    rows: np.ndarray  # [n, d] as stored
    queries: np.ndarray  # [m, d] as stored
    k: int
    query_kind: str = "float32"
    scales: np.ndarray | None = None
    numbers: np.ndarray | None = None
    segments: np.ndarray | None = None
    normalized: bool = False
    stride: int = 0  # elements from row to row; 0: packed
    device: dict[str, int] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        listed = len(self.rows) if self.numbers is None else len(self.numbers)
        if self.segments is None:
            return listed
        return int(np.diff(self.segments).max(initial=0))

    @property
    def kept(self) -> int:
        return min(self.k, self.longest)

    def pack(self) -> bytes:
        """The problem as tests/cuda_on_host/main.cpp reads it."""
        n, d = self.rows.shape
        listed = n if self.numbers is None else len(self.numbers)
        device = {"seed": 0, "multiprocessors": 2, "shared_bytes": 1 << 17, "clusters": 1, "offset": 0}
        arrays = [
            None if array is None else np.ascontiguousarray(array).tobytes()
            for array in (self.rows, self.scales, self.queries, self.numbers, self.segments)
        ]
        header = [TYPES.index(self.kind), TYPES.index(self.query_kind), n, d, self.stride or d]
        header += [len(self.queries), listed, self.longest, self.kept, int(self.normalized)]
        header += (device | self.device).values()
        header += [-1 if array is None else len(array) for array in arrays]
        return struct.pack("<20q", *header) + b"".join(array for array in arrays if array is not None)


@dataclass(frozen=True)
class Answer:
    """What the kernels found, and which way they took."""

    queries_per_block: int
    aligned: bool
    cluster: bool
    parts: int
    scores: np.ndarray
    indices: np.ndarray


def read_answers(file: Path, problems: list[Problem]) -> list[Answer]:
    data = file.read_bytes()
    answers, at = [], 0
    for problem in problems:
        plan = struct.unpack_from("<4q", data, at)
        shape = (len(problem.queries), problem.kept)
        count = shape[0] * shape[1]
        scores = np.frombuffer(data, np.float32, count, at + 32).reshape(shape)
        indices = np.frombuffer(data, np.int64, count, at + 32 + 4 * count).reshape(shape)
        answers.append(Answer(plan[0], bool(plan[1]), bool(plan[2]), plan[3], scores, indices))
        at += 32 + 12 * count
    assert at == len(data)
    return answers


def true_scores(problem: Problem, query: int) -> np.ndarray:
    """The float64 scores of one query's list; NaN where there is none."""
    rows = from_stored(problem.rows, problem.kind)
    if problem.scales is not None:
        with np.errstate(invalid="ignore"):
            rows = rows * problem.scales[:, None].astype(np.float64)
    photo = from_stored(problem.queries[query], problem.query_kind)
    numbers = np.arange(len(rows)) if problem.numbers is None else problem.numbers
    if problem.segments is not None:
        numbers = numbers[problem.segments[query] : problem.segments[query + 1]]
    known = (numbers >= 0) & (numbers < len(rows))
    listed = rows[numbers[known]]
    with np.errstate(all="ignore"):
        products = (listed * (photo / (np.sqrt((photo * photo).sum()) or 1.0))).sum(axis=1)
        norms = np.sqrt((listed * listed).sum(axis=1))
        if not problem.normalized:
            products = np.where(norms > 0, products / np.where(norms == 0, 1, norms), products)
    products[~np.isfinite(listed).all(axis=1)] = np.nan
    if not np.isfinite(photo).all():
        products[:] = np.nan
    scores = np.full(len(numbers), np.nan)
    scores[known] = products
    return scores


def check(problem: Problem, scores: np.ndarray, indices: np.ndarray, tolerance: float = 2e-6) -> None:
    """Assert that every score is right, the order and the ties too, and that nothing better was left out."""
    assert scores.shape == indices.shape == (len(problem.queries), problem.kept)
    for query in range(len(problem.queries)):
        expected = true_scores(problem, query)
        found = min(problem.kept, len(expected))
        row_scores, row_indices = scores[query, :found], indices[query, :found]
        assert (scores[query, found:] == -np.inf).all()
        assert (indices[query, found:] == -1).all()
        assert len(set(row_indices.tolist())) == found
        assert set(row_indices.tolist()) <= set(range(len(expected)))
        np.testing.assert_allclose(row_scores, expected[row_indices], rtol=0, atol=tolerance)
        ranks = np.where(np.isnan(row_scores), -np.inf, row_scores)
        assert np.array_equal(np.lexsort((row_indices, -ranks)), np.arange(found)), "order or ties"
        truth = np.where(np.isnan(expected), -np.inf, expected)
        best = np.sort(truth)[::-1][:found]
        assert (truth[row_indices] >= best[-1:] - 2 * tolerance).all(), "a better candidate was left out"
        missing = np.flatnonzero(np.isnan(expected))
        reported = row_indices[np.isnan(row_scores)]
        assert np.array_equal(reported, missing[: len(reported)]), "candidates without a score come in order"
