"""ONNX Runtime on a real GPU. Skipped, with the reason, elsewhere."""

import numpy as np
import pytest

from geoengine.engine.backends import open_backend
from geoengine.engine.backends.onnxruntime_cuda import OnnxRuntimeCuda
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError
from geoengine.engine.manifest import Variant
from geoengine.kernels import cosine_topk

pytestmark = pytest.mark.gpu

SIDES = (224, 256)
SIZES = (1, 2, 7, 8, 32, 33, 64, 100, 256, 300)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """CLIP's ViT-B/32 with random weights, for photos and one map encoder, held to the gates of a build."""
    from geoengine.engine.backends.cuda import gpu_info
    from geoengine.export.build import build_engines
    from geoengine.export.config import BuildConfig

    try:
        gpu_info()
    except BackendError as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("cuda") / "engines"
    config = BuildConfig(
        pretrained="none",
        precisions=("fp16",),
        backend="onnxruntime-cuda",
        input_sizes=SIDES,
        levels=(4,),
        out=folder,
    )
    build_engines(config)
    return EngineBundle.open(folder)


@pytest.fixture(scope="module", params=[Variant.fp16, Variant.fp16_attention])
def backend(bundle, request):
    opened = open_backend(bundle, backend="onnxruntime-cuda", precision=request.param)
    yield opened
    opened.close()


def pictures(count, side=224, seed=0):
    from geoengine.export.pictures import sample_pictures

    return sample_pictures(side, count, seed=seed)


def cosines(some, others):
    return (some.astype(np.float64) * others).sum(1)


@pytest.mark.parametrize("side", SIDES)
def test_embeddings_are_pytorchs(bundle, backend, side):
    from geoengine.export.reference import REFERENCE, check_pictures, load_reference

    expected = load_reference(bundle.path / REFERENCE)["photo", side]
    assert cosines(backend.encode("photo", check_pictures(side)), expected).min() >= 0.9999


@pytest.mark.parametrize("size", SIZES)
def test_an_embedding_does_not_depend_on_its_batch(backend, size):
    pixels = pictures(size)
    pixels[-1] = pixels[0]
    alone = backend.encode("z04", pixels[:1])
    for _ in range(3):  # the second time captures a CUDA graph, the third replays it
        embeddings = backend.encode("z04", pixels)
        assert cosines(embeddings[[0, -1]], alone).min() >= 0.99999


def test_a_cuda_graph_gives_what_a_plain_run_gives(bundle, backend):
    class Plain(OnnxRuntimeCuda):
        def provider_options(self):
            return super().provider_options() | {"enable_cuda_graph": "0"}

    plain = Plain(bundle, precision=backend.variant)
    try:
        for seed in range(4):
            pixels = pictures(8, seed=seed)
            np.testing.assert_array_equal(backend.encode("photo", pixels), plain.encode("photo", pixels))
    finally:
        plain.close()


def test_rows_are_scored_on_the_gpu(backend):
    pixels = pictures(70)
    rows = backend.rows("z04", 70)
    for start in range(0, 70, 25):
        rows.append(pixels[start : start + 25])
    embeddings = backend.encode("z04", pixels)
    listed, segments = np.arange(70, dtype=np.int64)[::-1].copy(), np.array([0, 30, 70], np.int64)
    scores, places = rows.top_k(embeddings[:2], 5, listed, segments)
    expected, best = cosine_topk(embeddings, embeddings[:2], 5, rows=listed, segments=segments)
    np.testing.assert_allclose(scores, expected, atol=1e-3)
    assert (places[:, 0] == best[:, 0]).all()
