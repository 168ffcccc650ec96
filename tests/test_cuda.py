"""The GPU's side of the backends, on an emulated CUDA that computes in ordinary memory."""

import sys

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("cuda-bindings has no wheels for this system", allow_module_level=True)

from trt_contract.bundles import write_fp16_bundle
from trt_contract.cudart import Emulated, EmulatedKernels, array_at
from trt_contract.pretend import EMBED_DIM, embeddings_of, tokens_of

from geoengine.engine.backends import cuda as module
from geoengine.engine.backends import gpu
from geoengine.engine.backends.cuda import Cuda, cuda_runtime, gpu_info
from geoengine.engine.backends.gpu import GRAPH_BATCHES, GpuFeed, graph_batch
from geoengine.engine.errors import BackendError, BundleError
from geoengine.engine.manifest import Variant
from geoengine.kernels import cosine_topk


@pytest.fixture
def emulated(monkeypatch):
    runtime = Emulated(name=b"NVIDIA H100", capability=(9, 0), driver=13020, total=1 << 30)
    monkeypatch.setattr(module, "cuda_runtime", lambda: runtime)
    return runtime


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_fp16_bundle(tmp_path_factory.mktemp("cuda") / "bundle")


class Encoder:
    """What a backend does between staging and rows, as one piece of work on the feed's stream."""

    def __init__(self, runtime, bundle, max_batch=8):
        self.runtime, self.batches, self.rooms = runtime, [], []
        self.cuda = Cuda()
        self.feed = GpuFeed(self.cuda, bundle, Variant.fp16, self.into, max_batch=max_batch)

    def encode(self, encoder, pixels):
        [embeddings] = self.feed.encode_mixed([(encoder, pixels)])
        return embeddings

    def into(self, pixels, runs, address):
        self.batches.append(pixels.shape)
        self.rooms.append(pixels.room)

        def compute():
            tokens = tokens_of(array_at(pixels.address, pixels.shape, np.uint8))
            rows = np.concatenate([embeddings_of(run.encoder, tokens[run.start : run.end]) for run in runs])
            self.runtime.check(address, rows.nbytes)
            array_at(address, rows.shape, np.float32)[...] = rows

        self.runtime.enqueue(self.feed.stream, compute)


def pictures(count, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_the_gpu_describes_itself(emulated):
    info = gpu_info()
    assert (info.name, info.compute_capability, info.driver) == ("NVIDIA H100", "9.0", "13.2")
    assert info.total_bytes == 1 << 30


def test_without_a_gpu_the_remedy_is_named(emulated, monkeypatch):
    emulated.devices = 0
    with pytest.raises(BackendError, match=r"no NVIDIA GPU with a working driver .no device.: install"):
        Cuda()
    refused = emulated.cudaError_t.cudaErrorInsufficientDriver
    monkeypatch.setattr(emulated, "_cudaGetDeviceCount", lambda: (refused, None))
    with pytest.raises(BackendError, match="driver version is insufficient"):
        Cuda()


def test_without_cuda_bindings_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match="pip install cuda-bindings"):
        cuda_runtime()


def test_a_full_gpu_is_said_in_words(emulated):
    with pytest.raises(
        BackendError, match="has no room for tokens: 2048 MiB are needed and 1024 MiB are free"
    ):
        Cuda().allocate(2 << 30, "tokens")


def test_errors_name_the_function_and_the_reason(emulated, monkeypatch):
    failed = emulated.cudaError_t.cudaErrorIllegalAddress
    monkeypatch.setattr(emulated, "_cudaStreamSynchronize", lambda stream: (failed,))
    cuda = Cuda()
    with pytest.raises(BackendError, match=r"cudaStreamSynchronize failed on NVIDIA H100: .*illegal"):
        cuda.synchronize(cuda.stream())


def test_a_capture_that_fails_leaves_the_stream_usable(emulated):
    cuda = Cuda()
    stream = cuda.stream()

    def refuse():
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        cuda.capture(stream, refuse)
    assert not emulated.capturing
    done = []
    graph = cuda.capture(stream, lambda: emulated.enqueue(stream, lambda: done.append(1)))
    assert not done
    cuda.launch(graph, stream)
    cuda.launch(graph, stream)
    cuda.synchronize(stream)
    assert done == [1, 1]
    cuda.close()
    assert not emulated.made and not emulated.memory


def test_pictures_go_through_in_batches_and_come_out_in_order(emulated, bundle):
    encoder = Encoder(emulated, bundle)
    for seed in range(3):
        pixels = pictures(21, seed=seed)
        found = encoder.encode("z01", pixels)
        np.testing.assert_allclose(found, embeddings_of("z01", tokens_of(pixels)), atol=1e-6)
    assert encoder.batches[:3] == [(8, 8, 8, 3), (8, 8, 8, 3), (5, 8, 8, 3)]
    assert encoder.encode("z01", pictures(0)).shape == (0, EMBED_DIM)


def test_pictures_of_several_encoders_share_batches(emulated, bundle):
    encoder = Encoder(emulated, bundle)
    groups = [
        ("z01", pictures(5)),
        ("z03", pictures(0)),
        ("z03", pictures(9, seed=1)),
        ("photo", pictures(2, 16)),
    ]
    found = encoder.feed.encode_mixed(groups)
    for (name, pixels), rows in zip(groups, found, strict=True):
        np.testing.assert_allclose(rows, embeddings_of(name, tokens_of(pixels)), atol=1e-6)
    assert [shape[:2] for shape in encoder.batches] == [(8, 8), (6, 8), (2, 16)]
    assert encoder.feed.encode_mixed([]) == []


def test_large_pictures_come_in_smaller_batches(emulated, bundle, monkeypatch):
    monkeypatch.setattr(gpu, "SLOT_BYTES", 3 * 16 * 16 * 3)
    encoder = Encoder(emulated, bundle)
    pixels = pictures(8, side=16)
    found = encoder.encode("photo", pixels)
    np.testing.assert_allclose(found, embeddings_of("photo", tokens_of(pixels)), atol=1e-6)
    assert [shape[0] for shape in encoder.batches] == [3, 3, 2]
    assert set(encoder.rooms) == {3}
    encoder.encode("photo", pictures(2))
    assert encoder.rooms[-1] == 12


def test_pictures_without_a_trunk_are_resized(emulated, bundle):
    encoder = Encoder(emulated, bundle)
    assert encoder.encode("photo", pictures(2, side=11)).shape == (2, EMBED_DIM)
    assert encoder.batches == [(2, 8, 8, 3)]


def test_wrong_pictures_and_encoders_are_refused(emulated, bundle):
    encoder = Encoder(emulated, bundle)
    with pytest.raises(ValueError, match="pixels must be uint8"):
        encoder.encode("photo", pictures(2).astype(np.float32))
    with pytest.raises(BundleError, match="no encoder 'z02'"):
        encoder.encode("z02", pictures(2))


def test_buffers_of_rows_are_used_again(emulated, bundle):
    encoder = Encoder(emulated, bundle)
    for _ in range(2):  # one for each staging buffer
        encoder.encode("photo", pictures(8))
    before = emulated.calls.count("cudaMalloc")
    for _ in range(5):
        encoder.encode("photo", pictures(8))
    assert emulated.calls.count("cudaMalloc") == before
    one, two = encoder.feed.rows("photo", 8), encoder.feed.rows("photo", 8)
    assert one._address != two._address


@pytest.mark.parametrize("kernels", [True, False])
def test_rows_are_scored_where_there_are_kernels(emulated, bundle, monkeypatch, caplog, kernels):
    module = EmulatedKernels(emulated) if kernels else None
    monkeypatch.setitem(sys.modules, "geoengine.kernels._topk_cuda", module)
    encoder = Encoder(emulated, bundle)
    assert ("scored on the CPU" in caplog.text) is not kernels
    rows = encoder.feed.rows("z01", 30)
    for seed in range(3):
        rows.append(pictures(10, seed=seed))
    table = np.concatenate([embeddings_of("z01", tokens_of(pictures(10, seed=seed))) for seed in range(3)])
    queries = table[[3, 17]]
    listed, segments = np.array([0, 3, 29, 17, 17, 2, 5]), np.array([0, 3, 7])
    scores, places = rows.top_k(queries, 9, listed, segments)
    right, best = cosine_topk(table, queries, 9, rows=listed, segments=segments)
    assert places[:, 0].tolist() == [1, 0] and places.shape == (2, 4)
    np.testing.assert_array_equal(places, best)
    np.testing.assert_allclose(scores, right, atol=1e-6)
    assert rows.top_k(queries, 3, listed[:0], np.zeros(3, np.int64))[0].shape == (2, 0)


def test_a_closed_feed_refuses_and_leaves_nothing(emulated, bundle):
    encoder = Encoder(emulated, bundle)
    rows = encoder.feed.rows("photo", 8)
    encoder.encode("photo", pictures(8))
    encoder.feed.close()
    encoder.feed.close()
    encoder.cuda.close()
    assert not emulated.memory and not emulated.made
    for refused in (lambda: rows.append(pictures(1)), rows.download, lambda: encoder.feed.rows("photo", 1)):
        with pytest.raises(BackendError, match="closed"):
            refused()


def test_small_batches_run_in_the_next_one_that_has_a_graph():
    assert [graph_batch(count, 256) for count in (1, 2, 3, 5, 9, 17, 32)] == [1, 2, 4, 8, 16, 32, 32]
    assert [graph_batch(count, 256) for count in (33, 64, 100, 256, 300)] == [None, 64, None, 256, None]
    assert [graph_batch(count, 20) for count in (17, 20, 16)] == [None, None, 16]
    assert all(graph_batch(batch, batch) == batch for batch in GRAPH_BATCHES)
