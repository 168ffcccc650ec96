"""The CUDA module without a GPU: it imports, says what is missing, checks arguments, and may be left out."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from geoengine import kernels

ROOT = Path(__file__).parents[1]
_topk_cuda = pytest.importorskip(
    "geoengine.kernels._topk_cuda", reason="built without CUDA kernels", exc_type=ImportError
)
without_a_device = pytest.mark.skipif(_topk_cuda.device_count() > 0, reason="has a CUDA device")

CALL = {
    "device": 0,
    "stream": 1,
    "dtype": "float16",
    "embeddings": 1 << 20,
    "n": 100,
    "d": 64,
    "row_stride": 64,
    "scales": 0,
    "queries": 1 << 20,
    "query_dtype": "float32",
    "m": 2,
    "rows": 0,
    "segments": 0,
    "rows_count": 100,
    "longest": 100,
    "k": 5,
    "normalized": False,
    "scores": 1 << 20,
    "indices": 1 << 20,
    "workspace": 1 << 20,
    "workspace_bytes": 1 << 20,
}


def test_the_stub_names_what_the_module_has():
    tree = ast.parse((ROOT / "kernels" / "_topk_cuda.pyi").read_text())
    stubs = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(stubs) == {name for name in vars(_topk_cuda) if not name.startswith("_")}
    for name, arguments in stubs.items():
        signature = getattr(_topk_cuda, name).__doc__.splitlines()[0]
        listed = re.findall(r"(?:\(|, )(\w+): ", signature)
        assert listed == [argument.arg for argument in arguments.args + arguments.kwonlyargs], signature
        assert ("*, " in signature) == bool(arguments.kwonlyargs)


def test_the_module_asks_for_no_cuda_library():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    listed = subprocess.run([readelf, "-d", _topk_cuda.__file__], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed.stdout)
    assert needed
    assert not [library for library in needed if "cuda" in library]


@without_a_device
def test_without_a_device_every_call_says_why():
    problem = _topk_cuda.driver_problem()
    assert re.search("NVIDIA driver", problem)
    assert _topk_cuda.device_count() == 0
    sizes = {name: CALL[name] for name in ("device", "dtype", "n", "d", "query_dtype", "m")}
    sizes |= {name: CALL[name] for name in ("rows_count", "longest", "k", "normalized")}
    for call in (
        lambda: _topk_cuda.allocate(100, 0, 1),
        lambda: _topk_cuda.free(1 << 20, 0, 1),
        lambda: _topk_cuda.wait(0, 1, 2),
        lambda: _topk_cuda.device_of(1 << 20),
        lambda: _topk_cuda.workspace_bytes(**sizes, has_rows=False, has_segments=False),
        lambda: _topk_cuda.topk(**CALL),
    ):
        with pytest.raises(RuntimeError, match=f"CUDA cannot be used: {re.escape(problem)}"):
            call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float64"}, "dtype must be float32, float16, bfloat16 or int8, got float64"),
        ({"query_dtype": "int8"}, "query_dtype must be float32, float16 or bfloat16, got int8"),
        ({"n": -1}, r"n must be in \[0, "),
        ({"d": 8193}, r"d must be in \[0, 8192\], got 8193"),
        ({"m": 1 << 28}, "m must be in"),
        ({"k": 0}, "k must be in"),
        ({"row_stride": 63}, r"row_stride must be in \[64, "),
        ({"rows_count": 1 << 32}, "rows_count must be in"),
        ({"longest": 101}, "longest must be in"),
        ({"longest": 99}, "longest must be rows_count"),
        ({"rows_count": 99, "longest": 99}, "rows_count must be n"),
        ({"dtype": "int8"}, "scales go with int8"),
        ({"scales": 1 << 20}, "scales go with int8"),
        ({"embeddings": 0}, "embeddings must not be null"),
        ({"queries": 0}, "queries must not be null"),
        ({"scores": 0}, "scores and indices must not be null"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        _topk_cuda.topk(**(CALL | change))


def test_nothing_to_do_needs_no_device():
    _topk_cuda.topk(**(CALL | {"m": 0, "workspace": 0}))
    _topk_cuda.topk(**(CALL | {"n": 0, "rows_count": 0, "longest": 0, "workspace": 0}))


class CudaArray:
    """Looks like a contiguous array on a device."""

    def __init__(self, shape: tuple[int, ...], typestr: str = "<f4") -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (1 << 20, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


@without_a_device
def test_the_public_function_says_why_too():
    with pytest.raises(RuntimeError, match="NVIDIA driver"):
        kernels.cosine_topk(CudaArray((4, 8)), CudaArray((1, 8)), 2)


class WithoutDriver(ModuleType):
    """Passes calls on to the real module, and answers where it got as far as to miss a driver."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(_topk_cuda, name)

        def call(*positional: object, **keywords: object) -> int:
            self.called.append(name)
            with pytest.raises(RuntimeError, match="CUDA cannot be used"):
                real(*positional, **keywords)
            return {"allocate": 1 << 21, "workspace_bytes": 1 << 10}.get(name, 0)

        return call


@without_a_device
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_public_function_calls_the_module_as_it_is(monkeypatch, quantized, lists):
    module = WithoutDriver(_topk_cuda.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rows: Any = CudaArray((90, 64), "<f2")
    if quantized:
        rows = kernels.Int8Rows(CudaArray((90, 64), "|i1"), CudaArray((90,)))
    chosen = {"rows": CudaArray((50,), "<i8"), "segments": CudaArray((4,), "<i8")} if lists else {}
    scores, indices = kernels.cosine_topk(rows, CudaArray((3, 64)), 7, stream=5, **chosen)
    assert scores.shape == indices.shape == (3, 7)
    assert {"device_of", "workspace_bytes", "allocate", "topk", "free"} <= set(module.called)


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory):
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja") or shutil.which("make")
    if cmake is None or ninja is None or find_spec("pybind11") is None:
        pytest.skip("needs cmake, ninja or make, and pybind11")
    import pybind11

    def run(mode: str, compiler: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("build")
        options = {
            "SKBUILD_PROJECT_NAME": "geoengine",
            "SKBUILD_PROJECT_VERSION": "0",
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": ninja,
            "GEOENGINE_CUDA": mode,
        }
        given = [f"-D{name}={value}" for name, value in options.items()]
        generator = "Ninja" if "ninja" in ninja else "Unix Makefiles"
        command = [cmake, "-S", ROOT, "-B", folder, "-G", generator, *given]
        environment = os.environ | {"CUDACXX": compiler}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    return run


def test_a_broken_compiler_stops_only_who_insists(configure, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    optional = configure("AUTO", str(broken))
    assert optional.returncode == 0, optional.stderr
    assert "Building without CUDA kernels: no working CUDA compiler" in optional.stdout
    insisting = configure("ON", str(broken))
    assert insisting.returncode != 0
    assert "GEOENGINE_CUDA=ON, but no working CUDA" in re.sub(r"\s+", " ", insisting.stderr)
    assert "must be ON, OFF or AUTO" in configure("YES", str(broken)).stderr


def test_the_gpu_figures_become_a_table():
    from geoengine.bench.kernels_gpu import table_of

    case = {"n": 10_000_000, "d": 512, "m": 1, "k": 16}
    rows = [
        {"name": "geoengine", "dtype": "float16", **case, "us": 2500.0, "share": 0.9},
        {"name": "PyTorch", "dtype": "float16", **case, "us": 10_000.0, "share": 0.2},
        {"name": "geoengine", "dtype": "int8", **case, "us": 1500.0, "share": 0.8},
    ]
    about = {name: name for name in ("gpu", "driver", "date", "commit")} | {"packages": {"torch": "2.8"}}
    table = table_of({"machine": about, "copy_bytes_per_second": 4.3e12, "rows": rows})
    assert "gpu, driver driver, PyTorch 2.8, date" in table and "copies run at 4.30 TB/s" in table
    assert "| 10,000,000 | 512 | 1 | 16 | float16 | 2500.0 | 90% |  | 10000.0 |  | 4.0 |" in table
    assert "| 10,000,000 | 512 | 1 | 16 | int8 | 1500.0 | 80% |  |  |  |  |" in table


def test_the_gpu_check_names_what_is_missing(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    script = ROOT / "bench" / "gpu_check.sh"
    done = subprocess.run(
        ["bash", script], env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"gpu_check: {python} has no numpy: install it, or name another PYTHON" in done.stderr
