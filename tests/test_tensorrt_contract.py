"""Our TensorRT code against the real Python bindings of four versions, without TensorRT's libraries or a GPU.

The bindings are downloaded from the package index (about 1.3 MB each, kept in pytest's cache) and loaded over
stub libraries that this test compiles. `trt_contract/replay.py` then runs our builder and runner on fakes
that know what the real classes know. Which parts of TensorRT are checked follows from what our code calls.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "trt_contract"
OLDER = ("10.13.3.9.post1", "10.16.1.11", "11.0.0.114")  # published for Python up to 3.13
VERSIONS = ("11.4.0.106",) if sys.version_info >= (3, 14) else (*OLDER, "11.4.0.106")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="TensorRT's CUDA 13 bindings are for Linux")


def run(*command, **settings):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def compiler():
    found = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang", "c++"))), None)
    assert found, "this test needs a C compiler: install one, such as gcc, or name it in CC"
    return found


@pytest.fixture(scope="session")
def replay(compiler, pytestconfig, tmp_path_factory):
    """A function from a version to what `replay.py` reports for it."""
    reports, cache = {}, pytestconfig.cache.mkdir("tensorrt-bindings")

    def replayed(version):
        if version not in reports:
            folder = tmp_path_factory.mktemp("trt")
            environment = os.environ | {
                "LD_LIBRARY_PATH": str(stub_libraries(compiler, folder, version.split(".")[0])),
                "PYTHONPATH": f"{bindings(cache, version)}{os.pathsep}{HERE.parent}",
                "CUDA_VISIBLE_DEVICES": "",  # a real GPU must not answer in the emulated one's place
                "OMP_NUM_THREADS": "1",
            }
            output = run(sys.executable, HERE / "replay.py", folder, env=environment)
            reports[version] = json.loads(output)
        return reports[version]

    return replayed


def stub_libraries(compiler, folder, major):
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        run(compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, HERE / "stub.c")
    return folder


def bindings(cache, version):
    """The folder with the unpacked bindings; a test without them would show nothing, so it fails without."""
    package = f"tensorrt-cu13-bindings=={version}"
    unpacked = cache / f"{version}-cp{sys.version_info.major}{sys.version_info.minor}"
    if not unpacked.is_dir():
        downloads = cache / "wheels"
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
        run(*pip, "--dest", downloads, package)
        [wheel] = downloads.glob(
            f"tensorrt_cu13_bindings-{version}-cp{sys.version_info.major}{sys.version_info.minor}-*"
        )
        partial = unpacked.with_suffix(".partial")
        shutil.unpack_archive(wheel, partial, "zip")
        partial.rename(unpacked)
    return unpacked


@pytest.mark.parametrize("version", VERSIONS)
def test_our_builder_and_runner_use_what_this_version_has(replay, version):
    report = replay(version)
    assert report["version"] == version
    checks = {name: problem for name, problem in report["report"].items() if name.startswith("check_")}
    assert len(checks) > 10
    assert not any(checks.values()), "\n".join(
        f"{name}:\n{problem}" for name, problem in checks.items() if problem
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fakes_can_fail(replay, version):
    refusals = {
        name: problem for name, problem in replay(version)["report"].items() if name.startswith("fake_")
    }
    assert len(refusals) == 3
    assert not any(refusals.values()), "\n".join(refusals.values())


def test_all_versions_are_used_in_the_same_way(replay):
    used = [set(replay(version)["used"]) for version in VERSIONS]
    assert all(names == used[0] for names in used)
    assert {"Builder.build_serialized_network", "IExecutionContext.execute_async_v3"} <= used[0]
    assert len(used[0]) > 40
