"""Real TensorRT on a real GPU: what the contract test cannot show. Skipped, with the reason, elsewhere."""

from dataclasses import replace

import numpy as np
import pytest

from geoengine.engine.backends.cuda import Cuda, gpu_info
from geoengine.engine.backends.plans import find_plans
from geoengine.engine.backends.tensorrt import TensorRt
from geoengine.engine.backends.tensorrt_runner import Runner, load_tensorrt, this_machine
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError
from geoengine.kernels import cosine_topk

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

SIDES = (224, 256)
SIZES = (1, 2, 7, 8, 32, 33, 64, 100, 256)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """CLIP's ViT-B/32 with random weights, for photos and one map encoder, compiled for this GPU."""
    try:
        gpu_info()
        load_tensorrt()
    except BackendError as missing:
        pytest.skip(str(missing))
    from geoengine.export.build import build_engines
    from geoengine.export.config import BuildConfig

    folder = tmp_path_factory.mktemp("tensorrt") / "engines"
    build_engines(
        BuildConfig(
            pretrained="none",
            precisions=("fp16",),
            backend="tensorrt",
            max_batch=256,
            input_sizes=SIDES,
            levels=(4,),
            out=folder,
        )
    )
    return EngineBundle.open(folder)


@pytest.fixture(scope="module")
def backend(bundle):
    opened = TensorRt(bundle)
    yield opened
    opened.close()


def pictures(count, side=224, seed=0):
    from geoengine.export.pictures import sample_pictures

    return sample_pictures(side, count, seed=seed)


def cosines(some, others):
    return (some.astype(np.float64) * others).sum(1)


def test_attention_is_fused(bundle):
    plans = find_plans(bundle, this_machine(gpu_info())).plans
    fused = {graph: plan.fused_attention for graph, plan in plans.items()}
    for graph, count in fused.items():
        # The last block attends from the class token alone, which TensorRT may compute otherwise.
        assert count >= (10 if "trunk" in graph else 1), fused


def test_embeddings_are_pytorchs(bundle, backend):
    from geoengine.export.reference import REFERENCE, check_pictures, load_reference

    for (encoder, side), expected in load_reference(bundle.path / REFERENCE).items():
        found = backend.encode(encoder, check_pictures(side))
        assert cosines(found, expected).min() >= 0.9999, (encoder, side)


@pytest.mark.parametrize("side", SIDES)
def test_an_embedding_does_not_depend_on_its_batch(backend, side):
    pixels = pictures(64, side)
    alone = backend.encode("photo", pixels[:1])
    for size in SIZES:
        batch = pixels[np.arange(size) % 64].copy()
        batch[-1] = pixels[0]
        for _ in range(3):  # as it is, then as a CUDA graph from either staging buffer
            found = backend.encode("photo", batch)
            assert cosines(found[[0, -1]], alone).min() >= 0.99999, size


def test_equal_pictures_have_equal_embeddings(backend):
    for size in SIZES:
        found = backend.encode("z04", np.repeat(pictures(1), size, axis=0))
        assert cosines(found, found[0]).min() >= 0.99999, size


@pytest.mark.parametrize("size", [1, 8, 20, 32, 64, 256])
def test_a_cuda_graph_computes_what_its_launches_do(bundle, size):
    """The first run of a size is launched; the third and fourth are graphs, one for each staging buffer."""
    opened = TensorRt(bundle)
    pixels = pictures(size)
    launched, *replayed = [opened.encode("photo", pixels) for _ in range(4)]
    opened.close()
    for found in replayed:
        np.testing.assert_array_equal(found, launched)


def test_rows_are_scored_on_the_gpu_as_on_the_cpu(backend):
    rows = backend.rows("z04", 300)
    for seed in range(3):
        rows.append(pictures(100, 256, seed=seed))
    queries = backend.encode("photo", pictures(5, seed=9))
    table = rows.download()
    listed = np.random.default_rng(0).permutation(300)
    segments = np.array([0, 100, 150, 150, 290, 300])
    scores, places = rows.top_k(queries, 16, listed, segments)
    expected, best = cosine_topk(table, queries, 16, rows=listed, segments=segments)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (places == best).mean() > 0.95  # places may change where scores are equal but for rounding


def test_closing_gives_the_memory_back(bundle):
    cuda = Cuda()
    before = cuda.free_bytes()
    opened = TensorRt(bundle)
    opened.encode("photo", pictures(256))
    assert cuda.free_bytes() < before
    opened.close()
    assert before - cuda.free_bytes() < 256 << 20  # what the libraries themselves keep
    cuda.close()


def test_rubbish_is_refused_in_words(bundle):
    cuda = Cuda()
    runner = Runner(cuda, cuda.stream(), 0)
    with pytest.raises(BackendError, match=r"refuses plan x .*; build it again"):
        runner.load(b"rubbish" * 1000, "plan x", "build it again")
    cuda.close()


def test_later_heads_come_from_the_timing_cache(bundle, tmp_path):
    """Heads are alike but for their weights, so nothing is left to measure for another one."""
    from geoengine.export import plan_builder
    from geoengine.export.tensorrt import plan_settings

    plans = find_plans(bundle, this_machine(gpu_info()))
    settings = plan_settings(plans.config.max_batch, plans.config.level)
    settings = replace(settings, flags={**settings.flags, "ERROR_ON_TIMING_CACHE_MISS": True})
    builder = plan_builder.PlanBuilder(settings, plans.folder / "timing.cache", plan_builder.Stop())
    head = bundle.path / bundle.manifest.graphs["fp16"].heads["z04"]
    profiles = plans.plans[bundle.manifest.graphs["fp16"].heads["z04"]].profiles
    builder.build(head, tmp_path / "head.plan", profiles, [], lambda phase, share: None)
