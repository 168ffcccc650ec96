"""Cosine top-k with threads: its own, Python's, none to be had, and after a fork."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from geoengine.kernels import _topk_cpu, cosine_topk


def made(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> None:
    assert a[0].tobytes() == b[0].tobytes()
    assert np.array_equal(a[1], b[1])


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_when_the_system_refuses_more_threads():
    code = """
import resource
import numpy as np
from geoengine.kernels import cosine_topk
rows = np.random.default_rng(0).standard_normal((5000, 16)).astype(np.float32)
alone = cosine_topk(rows, rows[:3], 7, threads=1)
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20, resource.RLIM_INFINITY))
crowd = cosine_topk(rows, rows[:3], 7, threads=200)
print(all(np.array_equal(a, b) for a, b in zip(alone, crowd)))
"""
    assert run_python(code) == "True\n"


def test_other_python_threads_run_meanwhile():
    # A third of a second of work in the slowest kernel; with the GIL held the loop below would not turn.
    rows = np.random.default_rng(0).standard_normal((150_000, 64)).astype(np.float32)
    slowest = {"threads": 1, "kernel": "portable"}
    thread = threading.Thread(target=_topk_cpu.cosine_topk, args=(rows, rows[:2], 5), kwargs=slowest)
    thread.start()
    turns = 0
    while thread.is_alive():
        thread.join(0.001)
        turns += 1
    assert turns > 5


def test_calls_from_several_python_threads_do_not_disturb_each_other():
    embeddings, queries = made(6, 3000, 48), made(7, 8, 48)
    expected = cosine_topk(embeddings, queries, 30)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(cosine_topk, embeddings, queries, 30, threads=2) for _ in range(16)]
    for call in calls:
        assert_same(call.result(), expected)


def test_a_missing_extension_is_one_sentence():
    code = """
import sys
sys.modules["geoengine.kernels._topk_cpu"] = None
try:
    import geoengine.kernels
except ImportError as error:
    print(error)
"""
    assert "building it is part of installing, so run `pip install .` in the source folder (" in run_python(
        code
    )


def test_a_fork_has_threads_of_its_own():
    code = """
import os
import numpy as np
from geoengine.kernels import cosine_topk
rows = np.random.default_rng(0).standard_normal((5000, 16)).astype(np.float32)
expected = cosine_topk(rows, rows[:3], 7, threads=3)
child = os.fork()
answer = cosine_topk(rows, rows[:3], 7, threads=3)
same = all(np.array_equal(a, b) for a, b in zip(expected, answer))
if child == 0:
    os._exit(0 if same else 1)
print(same, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code) == "True 0\n"
