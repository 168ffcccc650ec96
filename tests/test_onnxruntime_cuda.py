"""The ONNX Runtime CUDA backend: real graphs and IO binding, on an emulated CUDA in ordinary memory."""

import sys

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("cuda-bindings has no wheels for this system", allow_module_level=True)

from tiny_bundle import EMBED_DIM, IMAGE_SIZE, write_tiny_bundle
from trt_contract.cudart import Emulated, EmulatedKernels

from geoengine.engine.backends import cuda, open_backend
from geoengine.engine.backends import onnxruntime_cuda as module
from geoengine.engine.backends.onnxruntime_cuda import OnnxRuntimeCuda
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError


class OnHost(OnnxRuntimeCuda):
    """The backend with ONNX Runtime's provider for the CPU, whose runs wait on the emulated stream."""

    provider, device, max_batch = "CPUExecutionProvider", "cpu", 300

    def provider_options(self):
        return {}

    def enqueue(self, session, binding, options):
        graph = options.get_run_config_entry("gpu_graph_id")
        self.enqueued.append((binding, graph))
        self.runtime.enqueue(self._feed.stream, lambda: session.run_with_iobinding(binding))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return EngineBundle.open(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny"))


@pytest.fixture
def backend(bundle, monkeypatch):
    runtime = Emulated()
    monkeypatch.setattr(cuda, "cuda_runtime", lambda: runtime)
    monkeypatch.setattr(module, "share_arena", lambda provider: False)
    monkeypatch.setitem(sys.modules, "geoengine.kernels._topk_cuda", EmulatedKernels(runtime))
    OnHost.runtime, OnHost.enqueued = runtime, []
    opened = OnHost(bundle)
    yield opened
    opened.close()
    assert runtime.memory == {}, "everything is freed"


def pictures(count, side=IMAGE_SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def on_cpu(bundle, encoder, pixels):
    reference = open_backend(bundle, backend="onnxruntime-cpu", threads=1)
    try:
        return reference.encode(encoder, pixels)
    finally:
        reference.close()


@pytest.mark.parametrize("side", [IMAGE_SIZE, 16, 20])
@pytest.mark.parametrize("count", [0, 1, 7, 32, 33, 300, 301])
def test_embeddings_are_those_of_the_cpu(backend, bundle, count, side):
    pixels = pictures(count, side)
    np.testing.assert_allclose(backend.encode("z01", pixels), on_cpu(bundle, "z01", pixels), atol=1e-6)


def test_rows_of_several_calls_are_scored_where_they_are(backend, bundle):
    pixels = pictures(90)
    rows = backend.rows("z03", 90)
    for start, end in ((0, 1), (1, 33), (33, 90)):
        given = pixels[start:end].copy()
        rows.append(given)
        given[:] = 0  # a caller's buffer may be used again at once
    queries = np.random.default_rng(1).normal(size=(2, EMBED_DIM)).astype(np.float32)
    listed, segments = np.array([5, 40, 5, 89, 0, 7], np.int64), np.array([0, 4, 6], np.int64)
    scores, places = rows.top_k(queries, 3, listed, segments)
    embeddings = on_cpu(bundle, "z03", pixels)
    for query, own, found, best in zip(queries, (listed[:4], listed[4:]), places, scores, strict=True):
        cosines = embeddings[own] @ query / np.linalg.norm(query)
        expected = np.argsort(-cosines, kind="stable")[:3]
        assert found[: len(expected)].tolist() == expected.tolist()
        np.testing.assert_allclose(best[: len(expected)], cosines[expected], atol=1e-5)


def test_usual_batches_are_bound_once_and_keep_their_graph(backend):
    for seed in range(3):
        backend.encode("z01", pictures(7, seed=seed))
    bindings = [binding for binding, _ in OnHost.enqueued]
    graphs = [graph for _, graph in OnHost.enqueued]
    assert "-1" not in graphs
    assert bindings[4:] == bindings[:2], "the third call finds its pictures where the first one had them"
    assert graphs[4:] == graphs[:2]
    OnHost.enqueued.clear()
    backend.encode("z01", pictures(300))
    assert [graph for _, graph in OnHost.enqueued] == ["-1", "-1"]


def test_no_number_stands_for_two_cuda_graphs_of_a_session(backend):
    for count in (1, 8, 32):
        for encoder in ("z01", "z03"):
            for side in (IMAGE_SIZE, 16):
                backend.encode(encoder, pictures(count, side))
                backend.encode(encoder, pictures(count, side))
    by_graph = {}
    for binding, graph in OnHost.enqueued:
        by_graph.setdefault(graph, set()).add(id(binding))
    assert all(len(bindings) == 1 for bindings in by_graph.values())


def test_a_closed_backend_says_so(bundle, monkeypatch):
    runtime = Emulated()
    monkeypatch.setattr(cuda, "cuda_runtime", lambda: runtime)
    monkeypatch.setattr(module, "share_arena", lambda provider: False)
    OnHost.runtime, OnHost.enqueued = runtime, []
    opened = OnHost(bundle)
    opened.close()
    with pytest.raises(BackendError, match="closed"):
        opened.encode("z01", pictures(1))


def test_a_gpu_that_is_too_small_is_named(bundle, monkeypatch):
    runtime = Emulated(name=b"Tiny GPU", total=1000)
    monkeypatch.setattr(cuda, "cuda_runtime", lambda: runtime)
    with pytest.raises(BackendError, match="Tiny GPU has no room for "):
        OnHost(bundle)


def test_without_a_gpu_the_reason_is_told(bundle):
    with pytest.raises(BackendError, match=r"no NVIDIA GPU|has no CUDAExecutionProvider"):
        open_backend(bundle, backend="onnxruntime-cuda")


def test_a_provider_that_the_wheel_lacks_names_the_remedy():
    with pytest.raises(BackendError, match=r"has no NoProvider: .*'geoengine\[gpu\]'"):
        module.require_provider("NoProvider")


def test_an_arena_that_cannot_be_shared_is_told_once(caplog):
    module.share_arena.cache_clear()
    assert not module.share_arena("NoProvider")
    assert not module.share_arena("NoProvider")
    assert len(caplog.records) == 1
    module.share_arena.cache_clear()
