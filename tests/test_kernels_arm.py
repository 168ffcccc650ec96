"""The NEON kernel, cross-compiled and run under an emulator where both are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

CPU = Path(__file__).parents[1] / "kernels" / "cpu"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
SOURCES = ("dispatch", "kernel_neon", "kernel_portable", "pool", "quantize", "queries", "scan", "topk")


@pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++")
@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64")
def test_neon_gives_the_bits_of_the_portable_kernel(tmp_path):
    program = tmp_path / "kernels_agree"
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-static",
    ]
    inputs = [Path(__file__).with_name("kernels_agree.cpp"), *(CPU / f"{name}.cpp" for name in SOURCES)]
    subprocess.run(
        [COMPILER, *flags, "-pthread", "-DGEOENGINE_ARM_KERNELS", f"-I{CPU}", *inputs, "-o", program],
        check=True,
    )
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "neon portable 2816 answers equal\n"
