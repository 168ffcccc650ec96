"""The CUDA kernels, compiled for the host and run under ASan and UBSan.

Each thread of a block is a fiber, and fibers take turns at barriers and atomics in a random order. A barrier
that some threads never reach ends the run.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cuda_problems import STORED, TYPES, Answer, Problem, check, read_answers, to_bfloat16

ROOT = Path(__file__).parents[1]
Run = Callable[[list[Problem]], list[Answer]]

NO_CLUSTERS = {"clusters": 0}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Answers of the kernels on the host to a list of problems."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    here = ROOT / "tests" / "cuda_on_host"
    options = [compiler, "-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    options += ["-Wno-clobbered", "-I", here, "-I", ROOT / "kernels" / "cuda", "-x", "c++"]
    checked = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = {
        "topk.o": [*checked, ROOT / "kernels" / "cuda" / "topk.cu"],
        "main.o": [*checked, here / "main.cpp"],
        "fibers.o": ["-O2", here / "fibers.cpp"],
    }
    compilers = [
        subprocess.Popen([*options, *source, "-c", "-o", folder / name], stderr=subprocess.PIPE, text=True)
        for name, source in sources.items()
    ]
    for process in compilers:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    program = folder / "kernels"
    linked = subprocess.run(
        [compiler, *checked, *(folder / name for name in sources), "-o", program],
        capture_output=True,
        text=True,
    )
    if "cannot find" in linked.stderr:
        pytest.skip(f"needs the compiler's sanitizer libraries: {linked.stderr}")
    assert linked.returncode == 0, linked.stderr

    def answers(problems: list[Problem]) -> list[Answer]:
        (folder / "problems").write_bytes(b"".join(problem.pack() for problem in problems))
        command = [program, folder / "problems", folder / "answers"]
        environment = {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return read_answers(folder / "answers", problems)

    return answers


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        return to_bfloat16(values)
    return np.asarray(values, STORED[kind])


def random_problem(seed: int, kind: str, n: int, d: int, m: int, k: int, **options: object) -> Problem:
    """Rows of random direction and length, one in eight zero and one in eight a copy of another."""
    rng = np.random.default_rng(seed)
    scales = None
    if kind == "int8":
        values = rng.integers(-128, 128, (n, d))
        scales = rng.standard_normal(n).astype(np.float32)
        scales[rng.random(n) < 0.125] = 0
    else:
        values = rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-1, 1, (n, 1))
    values[rng.random(n) < 0.125] = 0
    copies = np.flatnonzero(rng.random(n) < 0.125)
    values[copies] = values[rng.integers(0, max(n, 1), copies.size)]
    query_kind = str(options.pop("query_kind", "float32"))
    queries = stored(rng.standard_normal((m, d)) * 10.0 ** rng.uniform(-1, 1, (m, 1)), query_kind)
    return Problem(
        kind=kind,
        rows=stored(values, kind),
        queries=queries,
        query_kind=query_kind,
        scales=scales,
        k=k,
        **options,  # type: ignore[arg-type]
    )


def check_all(run: Run, problems: list[Problem]) -> list[Answer]:
    answers = run(problems)
    for problem, answer in zip(problems, answers, strict=True):
        check(problem, answer.scores, answer.indices)
    return answers


def test_every_kernel_is_right(run):
    problems, wanted = [], set()
    for number, kind in enumerate(TYPES):
        query_kind = TYPES[number % 3]
        for m, offset, clusters in ((1, 0, 1), (1, 0, 0), (11, 0, 0), (2, 4, 1)):
            device = {"offset": offset, "clusters": clusters, "seed": number}
            d = 80 if m == 11 else 160
            problems.append(random_problem(number, kind, 400, d, m, 20, query_kind=query_kind, device=device))
            wanted.add((kind, 8 if m == 11 else 1, offset == 0, clusters == 1 and offset == 0))
    answers = check_all(run, problems)
    taken = {
        (problem.kind, answer.queries_per_block, answer.aligned, answer.cluster)
        for problem, answer in zip(problems, answers, strict=True)
    }
    assert taken == wanted


@pytest.mark.parametrize("normalized", [False, True])
def test_lists_of_rows(run, normalized):
    rng = np.random.default_rng(5)
    numbers = rng.integers(-3, 303, 700)
    segments = np.array([0, 0, 130, 600, 601, 601, 700])
    problems = []
    for kind, m, use, device in (
        ("float16", 6, segments, {}),
        ("int8", 6, segments, NO_CLUSTERS),
        ("bfloat16", 1, None, {}),
        ("float32", 9, None, NO_CLUSTERS),
    ):
        problem = random_problem(7, kind, 300, 48, m, 30, normalized=normalized, device=device)
        problem.numbers, problem.segments = numbers, use
        problems.append(problem)
    cut = random_problem(8, "float32", 300, 48, 3, 500, normalized=normalized)
    cut.segments = np.array([0, 200, 200, 300])
    if normalized:
        for problem in [*problems, cut]:
            values = problem.rows.astype(np.float64)
            if problem.kind in ("float16", "float32"):
                length = np.linalg.norm(values, axis=1, keepdims=True)
                problem.rows = (values / np.where(length > 0, length, 1)).astype(problem.rows.dtype)
            elif problem.kind == "int8":
                problem.scales = (problem.scales / np.sqrt(48) / 74).astype(np.float32)
    answers = run([*problems, cut])
    for problem, answer in zip([*problems, cut], answers, strict=True):
        tolerance = 2e-4 if normalized and problem.kind == "bfloat16" else 2e-6
        check(problem, answer.scores, answer.indices, tolerance)


def test_lists_that_lie_outside_are_cut_off(run):
    problem = random_problem(9, "float32", 60, 16, 4, 10)
    problem.numbers = np.arange(60)
    problem.segments = np.array([-5, 20, 10, 90, 2**62])
    answer = run([problem])[0]
    assert (answer.indices[1] == -1).all()
    assert set(answer.indices[0].tolist()) <= set(range(20))
    assert answer.indices[2].max() < 50
    assert (answer.indices[3] == -1).all()


def test_one_answer_whatever_the_company_and_the_order_of_threads(run):
    base = random_problem(11, "float16", 600, 72, 12, 40, device=NO_CLUSTERS)
    problems = [base]
    for seed, options in enumerate(
        [NO_CLUSTERS, NO_CLUSTERS, {"multiprocessors": 40, "clusters": 0}, {"offset": 2}, {"clusters": 1}]
    ):
        m = 12 if seed < 3 else 3
        problem = Problem(kind="float16", rows=base.rows, queries=base.queries[:m], k=40)
        problem.device = options | {"seed": seed + 1}
        problems.append(problem)
    first, *others = check_all(run, problems)
    assert {answer.cluster for answer in others} == {True, False}
    assert len({answer.parts for answer in others}) > 1
    for answer in others:
        m = len(answer.scores)
        assert answer.scores.tobytes() == first.scores[:m].tobytes()
        assert np.array_equal(answer.indices, first.indices[:m])


def test_ties_go_to_the_lower_position(run):
    # Entries of -1, 0, 1 in three columns: few distinct directions, many exact ties, in every part.
    rng = np.random.default_rng(13)
    rows = rng.integers(-1, 2, (900, 3)).astype(np.float32)
    queries = rng.integers(-1, 2, (9, 3)).astype(np.float32)
    wide = [np.pad(array, ((0, 0), (0, 1))) for array in (rows, queries)]
    problems = [
        Problem(kind="float32", rows=rows, queries=queries[:2], k=700, device={"multiprocessors": 20}),
        Problem(kind="float32", rows=wide[0], queries=wide[1], k=700, device=NO_CLUSTERS),
        Problem(kind="float32", rows=wide[0], queries=wide[1][:1], k=700),
    ]
    for problem, answer in zip(problems, check_all(run, problems), strict=True):
        whole = Problem(kind="float32", rows=problem.rows, queries=problem.queries, k=900)
        for query, indices in enumerate(answer.indices):
            exact = whole.rows.astype(int) @ whole.queries[query].astype(int)
            squares = np.maximum((whole.rows**2).sum(axis=1).astype(int), 1)
            # The order of dot / sqrt(square) without rounding.
            order = np.lexsort((np.arange(900), -np.sign(exact) * exact**2 * 6 // squares))
            assert np.array_equal(indices, order[:700])


def test_scores_that_rise_fall_or_stay(run):
    angles = np.linspace(0.1, 1.5, 1600, dtype=np.float32)
    rising = np.stack([np.sin(angles), np.cos(angles), 0 * angles, 0 * angles], axis=1)
    queries = np.eye(4, dtype=np.float32)[[0, 1]]
    problems = []
    for rows in (rising, rising[::-1], np.broadcast_to(rising[:1], rising.shape)):
        for m, k, device in (
            (1, 3, {}),
            (2, 70, NO_CLUSTERS),
            (1, 300, {"multiprocessors": 1, "clusters": 0}),
        ):
            problems.append(Problem(kind="float32", rows=rows, queries=queries[:m], k=k, device=device))
    check_all(run, problems)


def test_queries_whose_best_fill_up_at_different_times(run):
    # Query i's scores start to rise at row 32 i: with 32 rows between two barriers, the buffers of keys are
    # full, and sorted, in different turns.
    n = np.arange(640)
    heights = np.stack([np.clip(n - 32 * i - 100, 0, None) for i in range(4)], axis=1) / 1200.0
    rows = np.concatenate([heights, np.sqrt(1 - (heights**2).sum(axis=1, keepdims=True))], axis=1)
    rows = np.pad(rows, ((0, 0), (0, 3))).astype(np.float32)
    problems = []
    for seed in range(4):
        device = {"seed": seed, "multiprocessors": 1, "clusters": 0}
        queries = np.eye(8, dtype=np.float32)[:4]
        problems.append(Problem(kind="float32", rows=rows, queries=queries, k=3, device=device))
    check_all(run, problems)


def test_more_answers_than_one_pass_finds(run):
    problems = [
        random_problem(17, "float32", 1500, 4, 1, 1400),
        random_problem(18, "int8", 1300, 16, 9, 1300, device=NO_CLUSTERS),
        random_problem(19, "float16", 1100, 3, 2, 1024),
    ]
    problems[0].rows[::7] = np.nan
    problems[1].segments = np.array([0, 1, 1300, *[1300] * 7])
    check_all(run, problems)


def test_rows_and_queries_without_a_direction(run):
    problems = []
    for m, device in ((3, {}), (3, {"offset": 4}), (9, NO_CLUSTERS)):
        problem = random_problem(23, "float32", 200, 24, m, 200, device=device)
        rows = problem.rows
        rows[10, 3], rows[20, 23], rows[30] = np.nan, -np.inf, np.inf
        rows[40:50] *= np.float32(1e-30)
        rows[50:60] *= np.float32(1e30)
        rows[60:62] = np.finfo(np.float32).max
        rows[62:64] = np.float32(1e-45)
        problem.queries[1] = 0
        problem.queries[2, 5] = np.nan
        problem.queries[0] *= np.float32(1e-28)
        problems.append(problem)
    half = random_problem(24, "float16", 200, 24, 2, 50)
    half.rows[::3, 5] = np.inf
    quantized = random_problem(25, "int8", 200, 32, 2, 200)
    assert quantized.scales is not None
    quantized.scales[::5] = np.nan
    quantized.scales[1::5] = np.inf
    check_all(run, [*problems, half, quantized])


@pytest.mark.parametrize("kind", TYPES)
def test_any_width_stride_and_place(run, kind):
    size = np.dtype(STORED[kind]).itemsize
    problems = [
        random_problem(d, kind, 45, d, 2, 5, stride=d + gap, device={"offset": offset * size, "seed": d})
        for d, gap, offset in (
            (0, 0, 0),
            (1, 0, 0),
            (7, 2, 1),
            (16, 0, 3),
            (33, 31, 0),
            (96, 32, 0),
            (600, 0, 0),
        )
    ]
    check_all(run, problems)


def test_rows_more_than_two_to_the_31_values_apart(run):
    far = random_problem(31, "float16", 5, 64, 1, 5, stride=1 << 30)
    further = random_problem(32, "float32", 4, 33, 1, 4, stride=(1 << 30) + 1)
    check_all(run, [far, further])


def test_few_rows_and_none(run):
    problems = [
        random_problem(37, "float32", n, 8, m, 5, device=device)
        for n in (0, 1, 3, 5)
        for m, device in ((1, {}), (2, NO_CLUSTERS))
    ]
    nobody = random_problem(38, "float32", 0, 8, 2, 3)
    nobody.numbers = np.array([0, -1, 7])
    check_all(run, [*problems, nobody])


def test_many_answers_for_many_queries_fit_a_small_device(run):
    problem = random_problem(41, "float16", 600, 64, 10, 500, device={"shared_bytes": 1 << 16, "clusters": 0})
    answer = check_all(run, [problem])[0]
    assert answer.queries_per_block == 1
