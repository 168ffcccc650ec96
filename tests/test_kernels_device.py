"""What a call with arrays on a CUDA device asks of the CUDA kernels, seen by a stand-in that records it."""

import gc
import sys
import types

import numpy as np
import pytest

from geoengine.kernels import Int8Rows, _topk_cpu, cosine_topk


class FakeCudaKernels(types.ModuleType):
    """Records what the module with the CUDA kernels is asked for."""

    def __init__(self) -> None:
        super().__init__("geoengine.kernels._topk_cuda")
        self.calls: list[tuple[str, object]] = []
        self.next = 0x1000

    def allocate(self, size: int, device: int, stream: int) -> int:
        self.calls.append(("allocate", (size, device, stream)))
        self.next += 0x1000
        return self.next

    def free(self, pointer: int, device: int, stream: int) -> None:
        self.calls.append(("free", (pointer, device, stream)))

    def wait(self, device: int, stream: int, other: int) -> None:
        self.calls.append(("wait", (device, stream, other)))

    def device_of(self, pointer: int) -> int:
        return 1

    def workspace_bytes(self, **sizes: object) -> int:
        self.calls.append(("workspace_bytes", sizes))
        return 96

    def topk(self, **arguments: object) -> None:
        self.calls.append(("topk", arguments))

    def asked(self, name: str) -> list[object]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def cuda(monkeypatch) -> FakeCudaKernels:
    module = FakeCudaKernels()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


class OnDevice:
    """An array that says it lies on CUDA device 1."""

    def __init__(self, pointer: int, typestr: str, shape: tuple[int, ...], **more: object) -> None:
        self.__cuda_array_interface__ = {
            "data": (pointer, False),
            "typestr": typestr,
            "shape": shape,
            "strides": None,
            "version": 3,
        } | more


def test_cuda_arrays_go_to_the_cuda_kernels_as_pointers(cuda):
    rows = OnDevice(0xA000, "<f2", (100, 32), strides=(128, 2))
    answer = cosine_topk(
        rows,
        OnDevice(0xB000, "<f4", (3, 32)),
        7,
        rows=OnDevice(0xC000, "<i8", (50,)),
        segments=OnDevice(0xD000, "<i8", (4,)),
        normalized=True,
        stream=0x77,
    )
    [topk] = cuda.asked("topk")
    sizes = {"device": 1, "dtype": "float16", "n": 100, "d": 32, "query_dtype": "float32", "m": 3}
    sizes |= {"rows_count": 50, "longest": 50, "k": 7, "normalized": True}
    assert cuda.asked("workspace_bytes") == [sizes | {"has_rows": True, "has_segments": True}]
    scores, indices = answer
    assert topk == sizes | {
        "stream": 0x77,
        "embeddings": 0xA000,
        "row_stride": 64,
        "scales": 0,
        "queries": 0xB000,
        "rows": 0xC000,
        "segments": 0xD000,
        "scores": scores.pointer,
        "indices": indices.pointer,
        "workspace": 0x4000,
        "workspace_bytes": 96,
    }
    assert cuda.asked("allocate") == [(3 * 7 * 4, 1, 0x77), (3 * 7 * 8, 1, 0x77), (96, 1, 0x77)]
    assert cuda.asked("free") == [(0x4000, 1, 0x77)]
    assert scores.__dlpack_device__() == (2, 1)
    assert indices.__cuda_array_interface__ == {
        "data": (indices.pointer, False),
        "shape": (3, 7),
        "typestr": "<i8",
        "strides": None,
        "stream": 0x77,
        "version": 3,
    }


def test_answers_on_a_device_are_freed_after_their_readers(cuda):
    scores, indices = cosine_topk(OnDevice(0xA000, "<f4", (9, 8)), OnDevice(0xB000, "<f4", (2, 8)), 20)
    assert cuda.asked("topk")[0]["stream"] == 1
    capsule = scores.__dlpack__(stream=5)
    assert cuda.asked("wait") == [(1, 1, 5)]
    owner, pointer, *rest = _topk_cpu.read_dlpack(capsule)
    assert rest == [(2, 9), (9, 1), 2, 32, 2, 1]
    assert pointer == scores.pointer
    indices.__dlpack__(stream=1)
    frees = len(cuda.asked("free"))
    del scores, indices
    gc.collect()
    assert len(cuda.asked("free")) == frees + 1
    del owner
    gc.collect()
    assert cuda.calls[-2:] == [("wait", (1, 5, 1)), ("free", (pointer, 1, 1))]


def test_int8_rows_and_out_on_a_device(cuda):
    rows = Int8Rows(OnDevice(0xA000, "|i1", (9, 8)), OnDevice(0xE000, "<f4", (9,)))
    out = OnDevice(0xF000, "<f4", (2, 4)), OnDevice(0xF800, "<i8", (2, 4))
    assert cosine_topk(rows, OnDevice(0xB000, "<f2", (2, 8)), 4, out=out) is out
    [topk] = cuda.asked("topk")
    assert (topk["dtype"], topk["scales"], topk["query_dtype"]) == ("int8", 0xE000, "float16")
    assert (topk["scores"], topk["indices"]) == (0xF000, 0xF800)


def test_the_producers_stream_is_waited_for(cuda):
    rows = OnDevice(0xA000, "<f4", (9, 8), stream=9)
    cosine_topk(rows, OnDevice(0xB000, "<f4", (2, 8), stream=3), 4, stream=3)
    assert cuda.asked("wait") == [(1, 9, 3)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"queries": np.ones((2, 8), np.float32)}, ValueError, "queries must be on CUDA device 1 .* the CPU"),
        ({"queries": OnDevice(1, "<f8", (2, 8))}, TypeError, "queries must be .*, got float64"),
        ({"queries": OnDevice(1, "<f4", (2, 9))}, ValueError, r"queries must be \[m, 8\] .*, got \(2, 9\)"),
        (
            {"queries": OnDevice(1, "<f4", (2, 8), strides=(4, 8))},
            ValueError,
            "queries must be C-contiguous.*",
        ),
        (
            {"embeddings": OnDevice(1, "<f4", (9, 8), strides=(4, 36))},
            ValueError,
            "embeddings .*side by side.*",
        ),
        ({"embeddings": np.ones((9, 8), np.float32), "stream": 3}, ValueError, ".*where a stream is given.*"),
        ({"rows": OnDevice(1, "<i4", (3,))}, TypeError, "rows must be int64 on a CUDA device, got int32"),
        ({"segments": OnDevice(1, "<i8", (2,))}, ValueError, r"segments must have shape \(3,\), got \(2,\)"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"normalized": 1}, TypeError, "normalized must be True or False, got int"),
        ({"threads": 2}, ValueError, "scan and threads are for embeddings on the CPU"),
        ({"out": 3}, TypeError, r"out must be a tuple \(scores, indices\), got int"),
        (
            {"out": (OnDevice(1, "<f4", (2, 3)), OnDevice(1, "<i8", (2, 4)))},
            ValueError,
            r"out scores must have shape \(2, 4\), got \(2, 3\)",
        ),
    ],
    ids=str,
)
def test_bad_arguments_on_a_device_are_named(cuda, changes, error, message):
    good = {"embeddings": OnDevice(0xA000, "<f4", (9, 8)), "queries": OnDevice(0xB000, "<f4", (2, 8)), "k": 4}
    with pytest.raises(error, match=f"^{message}$"):
        cosine_topk(**good | changes)
    assert not cuda.asked("topk")


def test_queries_on_a_device_and_embeddings_on_the_cpu_are_refused(cuda):
    with pytest.raises(ValueError, match=r"^queries must be on the CPU like embeddings, got CUDA device 1$"):
        cosine_topk(np.ones((9, 8), np.float32), OnDevice(0xB000, "<f4", (2, 8)), 4)


def test_without_cuda_kernels_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "geoengine.kernels._topk_cuda", None)
    with pytest.raises(
        RuntimeError, match="this installation has no CUDA kernels: install from source where"
    ):
        cosine_topk(OnDevice(0xA000, "<f4", (9, 8)), OnDevice(0xB000, "<f4", (2, 8)), 4)
