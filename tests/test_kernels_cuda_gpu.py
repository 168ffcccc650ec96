"""Cosine top-k on a CUDA device, through PyTorch: exact, on the caller's stream, and in graphs."""

import threading
from typing import Any

import numpy as np
import pytest
from cuda_problems import TYPES, Problem, check
from test_kernels_cuda_host import random_problem

from geoengine.kernels import Int8Rows, cosine_topk

_topk_cuda = pytest.importorskip(
    "geoengine.kernels._topk_cuda", reason="built without CUDA kernels", exc_type=ImportError
)
_problem = _topk_cuda.driver_problem()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_problem is not None, reason=f"no CUDA device: {_problem}")]


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


def on_device(torch: Any, array: np.ndarray, kind: str = "") -> Any:
    if kind == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


def arguments(torch: Any, problem: Problem) -> tuple[list[Any], dict[str, Any]]:
    """What `cosine_topk` is given for a problem, rows at its stride."""
    n, d = problem.rows.shape
    stored = np.zeros((n, max(problem.stride, d)), problem.rows.dtype)
    stored[:, :d] = problem.rows
    embeddings = on_device(torch, stored, problem.kind)[:, :d]
    if problem.scales is not None:
        embeddings = Int8Rows(embeddings, on_device(torch, problem.scales))
    keywords = {"normalized": problem.normalized}
    if problem.numbers is not None:
        keywords["rows"] = on_device(torch, problem.numbers.astype(np.int64))
    if problem.segments is not None:
        keywords["segments"] = on_device(torch, problem.segments.astype(np.int64))
    return [embeddings, on_device(torch, problem.queries, problem.query_kind), problem.k], keywords


def to_numpy(torch: Any, answer: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    scores, indices = (torch.from_dlpack(part).cpu().numpy() for part in answer)
    return scores, indices


def solve(torch: Any, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    positional, keywords = arguments(torch, problem)
    return to_numpy(torch, cosine_topk(*positional, **keywords))


def check_device(torch: Any, problem: Problem) -> None:
    """An answer is right, and where the host could not know how short the lists are, the rest is empty."""
    scores, indices = solve(torch, problem)
    kept = problem.kept
    assert (scores[:, kept:] == -np.inf).all()
    assert (indices[:, kept:] == -1).all()
    check(problem, scores[:, :kept], indices[:, :kept])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("n", "d"), [(5, 512), (300, 33), (4096, 512), (4097, 768), (70_000, 64)])
@pytest.mark.parametrize("m", [1, 3, 20])
def test_exact_against_float64(torch, kind, n, d, m):
    check_device(torch, random_problem(n + d + m, kind, n, d, m, 16, query_kind=TYPES[m % 3]))


@pytest.mark.parametrize("k", [1, 64, 1000, 1024, 1025, 5000])
def test_few_and_many_answers(torch, k):
    for m in (1, 9):
        check_device(torch, random_problem(k, "float16", 6000, 24, m, k))


@pytest.mark.parametrize("kind", TYPES)
def test_any_width_and_stride(torch, kind):
    for d, gap in ((0, 1), (1, 0), (7, 2), (16, 0), (33, 31), (96, 32), (600, 0), (8192, 0)):
        check_device(torch, random_problem(d, kind, 90, d, 2, 5, stride=d + gap))


@pytest.mark.parametrize("n", [4000, 200_000, 3_000_000])
def test_ties_go_to_the_lower_index(torch, n):
    # Products of small integers: exact, and full of ties across all blocks.
    rng = np.random.default_rng(3)
    rows = rng.integers(-1, 2, (n, 8)).astype(np.float32)
    queries = rng.integers(-1, 2, (9, 8)).astype(np.float32)
    for m in (1, 9):
        problem = Problem(kind="float32", rows=rows, queries=queries[:m], k=2000, normalized=True)
        _, indices = solve(torch, problem)
        for query, found in zip(queries, indices, strict=False):
            assert np.array_equal(found, np.argsort(-(rows @ query), kind="stable")[:2000])


def test_rows_without_a_direction_rank_last(torch):
    for n, m in ((500, 1), (500, 9), (9000, 1)):
        problem = random_problem(n + m, "float32", n, 24, m, n)
        problem.rows[10, 3], problem.rows[20, 23], problem.rows[30] = np.nan, -np.inf, np.inf
        problem.rows[40:50] *= np.float32(1e-30)
        problem.rows[50:60] *= np.float32(1e30)
        problem.queries[-1, 5] = np.nan
        check_device(torch, problem)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("per_photo", [256, 5000])
def test_every_photo_has_its_own_list(torch, kind, per_photo):
    rng = np.random.default_rng(per_photo)
    problem = random_problem(5, kind, 3000, 512, 24, 40)
    lengths = rng.integers(0, per_photo + 1, 24)
    lengths[[0, 7]] = 0, per_photo
    problem.segments = np.concatenate([[0], np.cumsum(lengths)])
    problem.numbers = rng.integers(-2, 3002, problem.segments[-1])
    check_device(torch, problem)


def test_one_answer_whatever_the_company(torch):
    problem = random_problem(8, "float16", 4000, 512, 40, 64)
    positional, keywords = arguments(torch, problem)
    embeddings, queries, k = positional
    together = to_numpy(torch, cosine_topk(embeddings, queries, k, **keywords))
    again = to_numpy(torch, cosine_topk(embeddings, queries, k, **keywords))
    for i in range(0, 40, 13):
        alone = to_numpy(torch, cosine_topk(embeddings, queries[i : i + 1], k, **keywords))
        for whole, repeated, single in zip(together, again, alone, strict=True):
            assert whole[i].tobytes() == repeated[i].tobytes() == single[0].tobytes()


def test_runs_on_the_callers_stream_without_waiting(torch):
    problem = random_problem(9, "float16", 3000, 512, 2, 16)
    positional, keywords = arguments(torch, problem)
    cosine_topk(*positional, **keywords)  # what happens once is over
    stream = torch.cuda.Stream()
    later = torch.zeros_like(positional[1])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)  # 0.2 seconds and more
        later.copy_(positional[1])
        answer = cosine_topk(positional[0], later, 16, stream=stream.cuda_stream, **keywords)
        assert not stream.query(), "the call waited for the device"
    check(problem, *to_numpy(torch, answer))


def test_calls_on_two_streams_do_not_meet(torch):
    problems = [random_problem(i, "float16", 4000, 512, 4, 32) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in problems]
    given = [arguments(torch, problem) for problem in problems]
    torch.cuda.synchronize()
    answers: list[list[Any]] = [[], []]

    def work(i: int) -> None:
        positional, keywords = given[i]
        for _ in range(50):
            answers[i].append(cosine_topk(*positional, stream=streams[i].cuda_stream, **keywords))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for problem, found in zip(problems, answers, strict=True):
        first = to_numpy(torch, found[0])
        check(problem, *first)
        for answer in found[1:]:
            for part, expected in zip(to_numpy(torch, answer), first, strict=True):
                assert part.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("n", "m"), [(1024, 1), (1024, 12), (20_000, 1), (20_000, 12)])
def test_captured_in_a_graph(torch, n, m):
    problem = random_problem(n + m, "float16", n, 512, m, 16)
    (embeddings, queries, k), keywords = arguments(torch, problem)
    held = torch.zeros_like(queries)
    out = torch.zeros((m, k), device="cuda"), torch.zeros((m, k), dtype=torch.int64, device="cuda")
    cosine_topk(embeddings, held, k, out=out, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        cosine_topk(embeddings, held, k, out=out, stream=stream, **keywords)
    for shift in range(3):
        problem.queries = np.roll(problem.queries, shift, axis=1)
        held.copy_(on_device(torch, problem.queries))
        graph.replay()
        check(problem, out[0].cpu().numpy(), out[1].cpu().numpy())


def test_cupy_arrays_are_read_where_they_are(torch):
    cupy = pytest.importorskip("cupy")
    problem = random_problem(12, "float32", 2000, 64, 3, 10)
    answer = cosine_topk(cupy.asarray(problem.rows), cupy.asarray(problem.queries), 10)
    scores, indices = (cupy.asnumpy(cupy.from_dlpack(part)) for part in answer)
    check(problem, scores, indices)


def test_big_more_than_two_to_the_31_values(torch):
    n, d, k = 5_000_000, 512, 32
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of device memory")
    torch.manual_seed(4)
    embeddings = torch.empty((n, d), dtype=torch.float16, device="cuda")
    for chunk in embeddings.split(250_000):
        chunk.normal_()
    queries = torch.randn((10, d), device="cuda")
    best = n - 3
    embeddings[best] = queries[0].half()
    true = torch.cat(
        [
            torch.nn.functional.normalize(chunk.double()) @ torch.nn.functional.normalize(queries.double()).T
            for chunk in embeddings.split(250_000)
        ]
    )
    for m in (1, 10):
        scores, indices = (torch.from_dlpack(part) for part in cosine_topk(embeddings, queries[:m], k))
        assert indices[0, 0].item() == best
        for i in range(m):
            torch.testing.assert_close(scores[i].double(), true[indices[i], i], rtol=0, atol=2e-6)
            assert (scores[i].double() >= true[:, i].topk(k).values[-1] - 4e-6).all()
