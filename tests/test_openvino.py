"""The OpenVINO backend, on small int8 encoders."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from int8_bundle import MIDDLE, SIDE, make_tower, write_int8_bundle
from made_encoders import encode
from tiny_bundle import write_manifest, write_tiny_bundle

from geoengine.engine.backends.batches import PictureBatch, Run
from geoengine.engine.backends.openvino import MAX_BATCH, OpenVino
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.cores import available_cores
from geoengine.engine.errors import BackendError, BundleError
from geoengine.engine.preprocess import to_square
from geoengine.export.pictures import sample_pictures


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "middle"
    return EngineBundle.open(write_int8_bundle(folder, make_tower()))


@pytest.fixture(scope="module")
def backend(bundle):
    pytest.importorskip("openvino", reason="needs openvino, the extra of that name")
    opened = OpenVino(bundle, threads=2)
    yield opened
    opened.close()


def runtime_layers(backend):
    """Kind, type and precision of what OpenVINO made of the graphs' layers."""
    layers = []
    for request, *_ in backend._requests.values():
        for node in request.get_compiled_model().get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            layers.append(tuple(str(info[key].astype(str)) for key in ("layerType", "runtimePrecision")))
    return layers


def test_embeddings_are_those_of_onnx_runtime(backend, bundle):
    pixels = sample_pictures(SIDE, 16)
    for encoder in ("photo", "z01"):
        files = {SIDE: bundle.trunk_path(SIDE, "int8"), "head": bundle.head_path(encoder, "int8")}
        found, other = backend.encode(encoder, pixels), encode(files, SIDE, pixels)
        assert (found.dtype, found.shape) == (np.float32, (16, MIDDLE.output_dim))
        assert (found * other).sum(1).min() > 0.9999
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(backend.encode("photo", pixels) - found).max() > 0.01


def test_products_run_in_int8(backend):
    """Not what the file asks for, but what is executed."""
    backend.encode("photo", sample_pictures(SIDE, 2))
    dense = [precision for kind, precision in runtime_layers(backend) if kind == "FullyConnected"]
    # of trunk and head; the projection is float
    assert dense.count("u8") + dense.count("i8") == len(dense) - dense.count("f32")
    heads = [path for path, _ in backend._requests if path.name.startswith("head")]
    assert dense.count("f32") == len(heads) > 0
    assert len(dense) - dense.count("f32") >= 1 + 3 * 6 + 6 + 6
    assert "bf16" not in {precision for _, precision in runtime_layers(backend)}


@pytest.mark.parametrize("count", [1, 2, 7, MAX_BATCH, 2 * MAX_BATCH - 1, 2 * MAX_BATCH + 1])
def test_an_embedding_is_the_same_in_any_batch(backend, count):
    pixels = sample_pictures(SIDE, 4 * MAX_BATCH + 3)
    whole = backend.encode("photo", pixels)
    np.testing.assert_allclose(backend.encode("photo", pixels[:count]), whole[:count], rtol=0, atol=1e-6)
    np.testing.assert_allclose(backend.encode("photo", pixels[-count:]), whole[-count:], rtol=0, atol=1e-6)


def test_groups_of_several_encoders_share_trunk_batches(backend, bundle):
    names = sorted(bundle.manifest.graphs[backend.variant].heads)
    assert len(names) > 1
    groups = [(name, sample_pictures(SIDE, 7 + at)) for at, name in enumerate((*names, names[0], *names))]
    for (name, pixels), rows in zip(groups, backend.encode_mixed(groups), strict=True):
        np.testing.assert_allclose(rows, backend.encode(name, pixels), rtol=0, atol=1e-6)


def test_the_number_of_threads_changes_nothing(backend, bundle):
    pixels = sample_pictures(SIDE, 5)
    other = OpenVino(bundle, threads=1)
    np.testing.assert_array_equal(other.encode("photo", pixels), backend.encode("photo", pixels))
    for opened, threads in ((other, 1), (backend, 2)):
        for request, *_ in opened._requests.values():
            assert request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == threads
    other.close()


def test_a_batch_is_shared_out_among_streams(bundle):
    """And with fewer pictures than threads, one stream has all of them."""
    pytest.importorskip("openvino", reason="needs openvino, the extra of that name")
    opened = OpenVino(bundle, threads=3)
    assert opened.batch == 3 * MAX_BATCH
    for count, expected in ((2, {1}), (3, {1, 3}), (opened.batch + 1, {1, 3})):
        opened.encode("photo", sample_pictures(SIDE, count))
        assert {streams for _, streams in opened._requests} == expected
    opened.encode("z01", sample_pictures(SIDE, 1))  # a rest of a level must not have graphs compiled again
    assert (bundle.head_path("z01", "int8"), 1) not in opened._requests
    for (_, streams), requests in opened._requests.items():
        assert len(requests) == streams
        made = requests[0].get_compiled_model().get_property("NUM_STREAMS")
        assert made == min(streams, available_cores())  # OpenVINO makes no more
    opened.close()


def test_shares_of_a_batch_keep_every_picture_with_its_encoder():
    pixels = np.arange(11, dtype=np.uint8)[:, None, None, None]
    batch = PictureBatch(Path("trunk"), pixels, (Run("a", 0, 2), Run("b", 2, 9), Run("c", 9, 11)))
    for count in (1, 2, 3, 5, 11):
        found = []
        for rows, share in batch.shares(count):
            assert rows.stop - rows.start == len(share.pixels) > 0
            assert abs(len(share.pixels) - 11 / count) < 1
            for run in share.runs:
                found += [(run.encoder, int(x)) for x in share.pixels[run.start : run.end].ravel()]
        assert found == list(zip("aabbbbbbbcc", range(11), strict=True))


def test_a_share_that_fails_fails_the_batch(bundle):
    """But only once the others have ended, and the next batch is as good as before."""
    pytest.importorskip("openvino", reason="needs openvino, the extra of that name")
    opened = OpenVino(bundle, threads=2)
    pixels = sample_pictures(SIDE, 6)
    expected = opened.encode("photo", pixels)
    requests = opened._requests[bundle.head_path("photo", "int8"), 2]
    heads, ended = tuple(requests), []

    class Watched:
        def __init__(self, number):
            self.number = number

        def start_async(self, inputs, share_inputs):
            heads[self.number].start_async(inputs, share_inputs=share_inputs)

        def wait(self):
            heads[self.number].wait()
            ended.append(self.number)
            if self.number == 0:
                raise RuntimeError("out of\nmemory")

    requests[:] = Watched(0), Watched(1)
    with pytest.raises(BackendError, match=r"OpenVINO cannot run .*head_photo.int8.onnx: out of$"):
        opened.encode("photo", pixels)
    assert set(ended) == {0, 1}
    requests[:] = heads
    np.testing.assert_array_equal(opened.encode("photo", pixels), expected)
    opened.close()


ANOTHER_CPU = """
import sys
import numpy as np
from geoengine.engine.backends.batches import PictureBatch, Run
from geoengine.engine.backends.openvino import OpenVino
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.cores import available_cores
backend = OpenVino(EngineBundle.open(sys.argv[1]), threads=1)
np.save(sys.argv[3], backend.encode("photo", np.load(sys.argv[2])))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86 CPUs")
def test_older_cpus_give_the_same(backend, bundle, tmp_path):
    """AVX2 adds products in 16 bits, which weights of full 8 bits would overflow."""
    pixels = sample_pictures(SIDE, 8)
    np.save(tmp_path / "pixels.npy", pixels)
    paths = [str(bundle.path), str(tmp_path / "pixels.npy"), str(tmp_path / "found.npy")]
    older = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-P", "-c", ANOTHER_CPU, *paths], check=True, env=older, timeout=60)
    np.testing.assert_allclose(
        np.load(paths[2]), backend.encode("photo", pixels), rtol=0, atol=1e-3
    )  # other instructions round layer normalisations in another way


def test_no_pictures(backend):
    assert backend.encode("photo", sample_pictures(SIDE, 1)[:0]).shape == (0, MIDDLE.output_dim)


def test_pictures_of_any_side_and_layout(backend):
    large = sample_pictures(96, 3)
    direct = backend.encode("photo", large)
    resized = np.stack([to_square(picture, SIDE) for picture in large])
    assert (direct * backend.encode("photo", resized)).sum(1).min() > 0.999
    odd = sample_pictures(70, 3)
    resized = np.stack([to_square(picture, SIDE) for picture in odd])
    np.testing.assert_array_equal(backend.encode("photo", odd), backend.encode("photo", resized))
    strided = sample_pictures(2 * SIDE, 4)[::2, ::2, ::2]
    np.testing.assert_array_equal(backend.encode("photo", strided), backend.encode("photo", strided.copy()))


def test_threads_may_call_at_once(backend):
    results = {}

    def work(seed):
        results[seed] = backend.encode("z01" if seed % 2 else "photo", sample_pictures(SIDE, 40, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, found in results.items():
        encoder = "z01" if seed % 2 else "photo"
        np.testing.assert_array_equal(found, backend.encode(encoder, sample_pictures(SIDE, 40, seed)))


def test_an_idle_backend_uses_no_cpu(backend):
    backend.encode("photo", sample_pictures(SIDE, 4))
    time.sleep(0.2)  # threads look out for more work for a moment
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_wrong_input(backend):
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(n, S, S, 3\), got float32"):
        backend.encode("photo", sample_pictures(SIDE, 1).astype(np.float32))
    with pytest.raises(BundleError, match="no encoder 'z16'"):
        backend.encode("z16", sample_pictures(SIDE, 1))


def test_a_closed_backend_says_so(backend, bundle):
    opened = OpenVino(bundle)
    opened.encode("photo", sample_pictures(SIDE, 1))
    opened.close()
    with pytest.raises(BackendError, match="backend openvino is closed"):
        opened.encode("photo", sample_pictures(SIDE, 1))


def test_a_graph_that_is_none(backend, bundle, tmp_path):
    folder = write_int8_bundle(tmp_path / "middle", make_tower(), levels=(1,), sides=(SIDE,))
    (folder / "onnx" / "head_z01.int8.onnx").write_bytes(b"not a graph")
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
    opened = OpenVino(EngineBundle.open(folder), threads=1)
    with pytest.raises(BackendError, match=r"OpenVINO cannot load .*head_z01\.int8\.onnx: ") as caught:
        opened.encode("z01", sample_pictures(SIDE, 1))
    assert "\n" not in str(caught.value)
    for content in (b"other", (folder / "onnx" / "head_photo.int8.onnx").read_bytes()):
        (folder / "onnx" / "head_z01.int8.onnx").write_bytes(content)
        write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
        with pytest.raises(BundleError, match="has been replaced by another one"):
            opened.encode("z01", sample_pictures(SIDE, 1))
    opened.close()


def test_a_bundle_without_int8(tmp_path):
    tiny = EngineBundle.open(write_tiny_bundle(tmp_path / "tiny"))
    with pytest.raises(
        BackendError, match=r"has no int8 graphs, .*`geoengine build-engines --precision int8`"
    ):
        OpenVino(tiny)


def test_without_openvino(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install 'geoengine\[openvino\]'"):
        OpenVino(bundle)
