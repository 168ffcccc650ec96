"""Run our builder and our runner on one version of TensorRT's bindings; prints what failed and what was used.

`python replay.py FOLDER`, with those bindings and `tests` in PYTHONPATH, stub libraries in LD_LIBRARY_PATH.
"""

import json
import logging
import os
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import tensorrt_bindings as trt
from trt_contract.bundles import write_fp16_bundle
from trt_contract.contract import Contract
from trt_contract.cudart import GARBAGE, Emulated, EmulatedKernels, array_at
from trt_contract.pretend import EMBED_DIM, Pretend, embeddings_of, tokens_of

from geoengine.engine.backends import cuda
from geoengine.engine.backends import tensorrt as backend_module
from geoengine.engine.backends.plans import PlanSet, load_plans
from geoengine.engine.backends.tensorrt import TensorRt
from geoengine.engine.errors import BackendError
from geoengine.export import plan_builder
from geoengine.export import tensorrt as export_module
from geoengine.export.tensorrt import build_plans, mark_checked, plan_profiles, plan_settings
from geoengine.kernels import cosine_topk

FOLDER = Path(sys.argv[1])
CONTRACT, CUDART = Contract(trt), Emulated()
PRETEND = Pretend(CONTRACT, CUDART)
sys.modules["tensorrt"] = PRETEND.module()
cuda.cuda_runtime = lambda: CUDART
export_module._CHILD = (sys.executable, str(Path(__file__).with_name("child.py")))
os.environ["TRT_USED"] = str(FOLDER / "used.json")
BUNDLE = write_fp16_bundle(FOLDER / "bundle")
sys.modules["geoengine.kernels._topk_cuda"] = EmulatedKernels(CUDART)


def pictures(count, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def expected(encoder, pixels):
    return embeddings_of(f"head_{encoder}", tokens_of(pixels))


def fails(error, *words):
    """A context that expects an error whose text has all these words."""

    class Expect:
        def __enter__(self):
            return self

        def __exit__(self, kind, value, trace):
            assert kind is not None and issubclass(kind, error), f"expected {error.__name__}, got {value!r}"
            for word in words:
                assert word in str(value), f"{word!r} is not in: {value}"
            return True

    return Expect()


def check_a_whole_build_in_its_own_process():
    seen = []
    reports = build_plans(BUNDLE, max_batch=1024, progress=lambda *step: seen.append(step))
    with fails(BackendError, "have not been checked"):
        TensorRt(BUNDLE)
    mark_checked(BUNDLE)
    assert [report.graph for report in reports] == BUNDLE.manifest.graphs["fp16"].files()
    folder = BUNDLE.path / "tensorrt" / f"emulated-gpu-sm90-trt{trt.__version__}"
    plans = load_plans(folder)
    assert {plan.profiles for plan in plans.plans.values()} == {((1, 8, 32), (33, 256, 1024))}
    for report in reports:
        file = BUNDLE.path / report.artifact
        assert file.parent == folder and file.stat().st_size == report.bytes
        assert not report.reused and report.fused_attention == 1
        built = json.loads(file.read_text())
        assert built["profiles"] == [[1, 8, 32], [33, 256, 1024]]
    assert (folder / "timing.cache").read_bytes() == b"timings"
    assert not list(folder.glob(".*.tmp"))
    done = [step[0] for step in seen]
    assert done == sorted(done) and seen[-1] == (500, 500, "")
    assert len({step[2] for step in seen if "Timing" in step[2]}) == 5
    CONTRACT.used.update(json.loads(Path(os.environ["TRT_USED"]).read_text()))


def check_a_second_build_starts_no_process():
    export_module._CHILD, kept = ("false",), export_module._CHILD
    assert all(report.reused for report in build_plans(BUNDLE, max_batch=1024))
    export_module._CHILD = kept


def build_here(trouble, graphs=("onnx/trunk.8.fp16.onnx", "onnx/head_z01.fp16.onnx"), **settings):
    """Build in this process, as the other one would; returns the events."""
    PRETEND.trouble, events = trouble, []
    stop = plan_builder.Stop()

    def send(event):
        events.append(event)
        if trouble.get("stop") and event["event"] == "progress":
            stop.wanted = True

    plans = [
        {
            "graph": graph,
            "onnx": str(BUNDLE.path / graph),
            "plan": str(FOLDER / f"{index}.tmp"),
            "profiles": plan_profiles(64),
            "exact": ["resize"] if "16" in graph else [],
        }
        for index, graph in enumerate(graphs)
    ]
    config = replace(plan_settings(64, 2), **settings)
    job = {"config": asdict(config), "cache": str(FOLDER / "cache"), "plans": plans}
    plan_builder.run_job(json.loads(json.dumps(job)), send, stop)
    PRETEND.trouble = {}
    return events


def check_the_settings_reach_tensorrt():
    configs = []
    original = plan_builder.PlanBuilder._configure

    def spy(self, *args):
        configs.append(original(self, *args))
        return configs[-1]

    plan_builder.PlanBuilder._configure = spy
    events = build_here({})
    plan_builder.PlanBuilder._configure = original
    assert [event["event"] for event in events if event["event"] != "progress"] == ["built", "built"]
    config = configs[0]._behaviour
    assert config.flags_on == {trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE: True, trt.BuilderFlag.TF32: False}
    assert config.builder_optimization_level == 2
    assert config.profiles == [
        ((1, 8, 8, 3), (8, 8, 8, 3), (32, 8, 8, 3)),
        ((33, 8, 8, 3), (64, 8, 8, 3), (64, 8, 8, 3)),
    ]


def check_timing_caches_are_used_and_stale_ones_are_not():
    (FOLDER / "cache").write_bytes(b"of another GPU")
    PRETEND.caches.clear()
    build_here({})
    assert PRETEND.caches == [b"of another GPU", b"", b"timings"]


def check_failures_name_the_node_and_the_reason():
    for trouble, words in {
        "parse": ("head_z01", "'blk.0.attention'", "MatMul", "types differ", "'blk.1.attention'"),
        "build": ("head_z01", "Could not find any implementation for node blk.3"),
        "fp32": ("head_z01", "fp16", "'blk.3.wo'", "1 of 2"),
        "fp32 kernel": ("head_z01", "fp32", "blk.3.wo_myl0_7", "gemm_f32f32"),
    }.items():
        events = build_here({"head_z01": trouble})
        assert [event["event"] for event in events if event["event"] != "progress"] == ["built", "failed"]
        assert events[-1]["graph"] == "onnx/head_z01.fp16.onnx"
        for word in words:
            assert word in events[-1]["reason"], events[-1]["reason"]


def check_a_build_stops_when_it_is_told_to():
    (FOLDER / "cache").unlink()
    events = build_here({"trunk.8": "endless", "stop": True})
    assert (FOLDER / "cache").read_bytes() == b"timings", "what was measured is kept"
    assert events[-1] == {"event": "stopped"}
    assert not any(event["event"] == "built" for event in events)


def check_too_little_memory_is_said_before_the_build():
    CUDART.free, kept = 1000, CUDART.free
    [event] = build_here({})
    CUDART.free = kept
    assert event["event"] == "failed" and "smaller --max-batch" in event["reason"], event


def check_every_batch_gives_its_own_embeddings():
    backend = TensorRt(BUNDLE)
    PRETEND.executed.clear()
    for count in (1, 2, 3, 8, 20, 32, 33, 64, 100, 256, 300, 1024, 1300):
        for seed in range(3):  # plain, then from the CUDA graph of one staging buffer, then of the other
            pixels = pictures(count, seed=seed)
            embeddings = backend.encode("z01", pixels)
            assert embeddings.shape == (count, EMBED_DIM) and embeddings.dtype == np.float32
            np.testing.assert_allclose(embeddings, expected("z01", pixels), atol=1e-6)
    assert {3, 20}.isdisjoint(PRETEND.executed), "small batches are padded to those with a graph"
    assert {33, 100, 300, 1024} <= set(PRETEND.executed)
    assert PRETEND.captured, "no CUDA graph was captured"
    launched = CUDART.calls.count("cudaGraphLaunch")
    backend.encode("z01", pictures(64))
    assert CUDART.calls.count("cudaGraphLaunch") == launched + 2, "trunk and head, one launch each"
    assert backend.encode("z01", pictures(0)).shape == (0, EMBED_DIM)
    backend.close()


def check_encoders_and_picture_sides():
    backend = TensorRt(BUNDLE)
    for encoder in ("photo", "z01", "z03"):
        for side in (8, 16):
            pixels = pictures(5, side)
            np.testing.assert_allclose(backend.encode(encoder, pixels), expected(encoder, pixels), atol=1e-6)
    resized = backend.encode("photo", pictures(2, 11))
    assert resized.shape == (2, EMBED_DIM) and np.isfinite(resized).all()
    backend.close()


def check_pictures_of_several_encoders_share_the_trunk():
    backend = TensorRt(BUNDLE)
    for counts in ((3, 0, 2, 1), (20, 12, 30, 9), (300, 1, 200, 900)):
        groups = [
            (encoder, pictures(count, seed=count))
            for encoder, count in zip(("z01", "photo", "z03", "z01"), counts, strict=True)
        ]
        for _ in range(3):  # once with each staging buffer, then from a captured graph
            PRETEND.executed.clear()
            found = backend.encode_mixed(groups)
            for (encoder, pixels), rows in zip(groups, found, strict=True):
                np.testing.assert_allclose(rows, expected(encoder, pixels), atol=1e-6)
    backend.close()


def check_staging_waits_for_what_still_reads_it():
    for eager in (False, True):
        backend = TensorRt(BUNDLE)
        for seed in range(3):
            pixels = pictures(5000, seed=seed)
            CUDART.eager = {backend._feed._staging._copies} if eager else set()
            np.testing.assert_allclose(backend.encode("z01", pixels), expected("z01", pixels), atol=1e-6)
        CUDART.eager = set()
        backend.close()


def check_rows_stay_on_the_gpu_until_they_are_scored():
    backend = TensorRt(BUNDLE)
    rows = backend.rows("z03", 700)
    batches = [pictures(count, seed=count) for count in (256, 40, 256, 3)]
    buffer = np.empty((256, 8, 8, 3), np.uint8)
    for batch in batches:
        buffer[: len(batch)] = batch
        rows.append(buffer[: len(batch)])
        buffer[:] = 0  # the caller's memory is its own again
    table = np.concatenate([expected("z03", batch) for batch in batches])
    np.testing.assert_allclose(rows.download(), table, atol=1e-6)
    after = array_at(rows._address + table.nbytes, (1000,), np.uint8)
    assert (after == GARBAGE).all(), "padding was written behind the rows"
    listed = np.random.default_rng(0).integers(0, len(table), 50)
    segments = np.array([0, 30, 30, 50])
    queries = expected("photo", pictures(3, seed=9))
    scores, places = rows.top_k(queries, 40, listed, segments)
    right, best = cosine_topk(table, queries, 40, rows=listed, segments=segments)
    assert scores.shape == (3, 30)
    np.testing.assert_array_equal(places, best)
    np.testing.assert_allclose(scores, right, atol=1e-6)
    with fails(ValueError, "room for 700"):
        rows.append(pictures(300))
    backend.close()
    with fails(BackendError, "closed"):
        rows.append(pictures(1))


def check_plans_that_cannot_be_captured_run_all_the_same():
    logging.getLogger("geoengine").addHandler(logging.NullHandler())
    PRETEND.trouble = {"head_z01": "no capture"}
    backend = TensorRt(BUNDLE)
    for seed in range(4):
        pixels = pictures(8, seed=seed)
        np.testing.assert_allclose(backend.encode("z01", pixels), expected("z01", pixels), atol=1e-6)
    PRETEND.trouble, CUDART.refuse_capture = {}, True
    for seed in range(4):
        pixels = pictures(16, seed=seed)
        np.testing.assert_allclose(backend.encode("photo", pixels), expected("photo", pixels), atol=1e-6)
    CUDART.refuse_capture = False
    backend.close()


def check_a_batch_outside_all_profiles_is_refused():
    backend = TensorRt(BUNDLE)
    plan = next(iter(backend._loaded.values()))
    with fails(ValueError, "1 to 1024", "5000"):
        plan.enqueue(5000, 0, 0)
    backend.close()


def check_closing_frees_everything():
    before = set(CUDART.memory), set(CUDART.made)
    backend = TensorRt(BUNDLE)
    backend.encode("photo", pictures(40))
    backend.encode("z01", pictures(8))
    assert set(CUDART.memory) > before[0]
    backend.close()
    assert (set(CUDART.memory), set(CUDART.made)) == before
    with fails(BackendError, "closed"):
        backend.encode("photo", pictures(1))
    backend.close()


def check_other_machines_and_damaged_plans_are_refused():
    rebuild = f"geoengine build-engines --plans --out {BUNDLE.path}"
    before = set(CUDART.memory), set(CUDART.made)
    CUDART.driver = 12080
    with fails(BackendError, "CUDA 13.2", "CUDA 12.8", rebuild):
        TensorRt(BUNDLE)
    CUDART.driver = 13020
    CUDART.rename(b"Other GPU")
    with fails(BackendError, "Other GPU", "Emulated GPU (compute capability 9.0)", trt.__version__, rebuild):
        TensorRt(BUNDLE)
    CUDART.rename(b"Emulated GPU")
    CUDART.free, kept = 1000, CUDART.free
    with fails(BackendError, "GPU memory", "1024"):
        TensorRt(BUNDLE)
    CUDART.free = kept
    plans = load_plans(next((BUNDLE.path / "tensorrt").iterdir()))
    refused = json.dumps({"of": "another GPU"}).encode()[:-1]
    assert isinstance(plans, PlanSet)
    read, backend_module.read_plan = backend_module.read_plan, lambda *args: refused
    with fails(BackendError, "refuses plan", "the plan is for another device", rebuild):
        TensorRt(BUNDLE)
    backend_module.read_plan = read
    assert (set(CUDART.memory), set(CUDART.made)) == before, "a failing start leaves nothing behind"


def fake_refuses_what_tensorrt_never_had():
    fakes = Contract(trt)  # another one: what these use is not what our code uses
    context, engine, builder = (fakes.fake(name) for name in ("IExecutionContext", "ICudaEngine", "Builder"))
    for error, wrong in (
        (AttributeError, lambda: context.execute_async_v2),
        (AttributeError, lambda: engine.num_bindings),
        (AttributeError, lambda: engine.get_binding_shape(0)),
        (AttributeError, lambda: setattr(engine, "num_layers", 3)),
        (AttributeError, lambda: setattr(context, "no_such_thing", 3)),
        (TypeError, lambda: context.execute_async_v3(stream=1)),
        (TypeError, lambda: context.execute_async_v3(None)),
        (TypeError, lambda: context.set_input_shape("pixels", 8)),
        (TypeError, lambda: context.set_tensor_address("pixels", 1.5)),
        (TypeError, lambda: builder.create_network(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)),
        (TypeError, lambda: builder.build_serialized_network(network=1, config=2)),
        (TypeError, lambda: builder.create_network(1, 2)),
        (TypeError, lambda: sys.modules["tensorrt"].Runtime()),
        (TypeError, lambda: sys.modules["tensorrt"].Builder(logger="x")),
    ):
        with fails(error):
            wrong()


def fake_refuses_what_tensorrt_11_dropped():
    module = sys.modules["tensorrt"]
    fakes = Contract(trt)
    builder, engine, config = (fakes.fake(name) for name in ("Builder", "ICudaEngine", "IBuilderConfig"))
    dropped = (
        lambda: module.BuilderFlag.FP16,
        lambda: module.NetworkDefinitionCreationFlag.EXPLICIT_BATCH,
        lambda: builder.platform_has_fast_fp16,
        lambda: engine.device_memory_size,
        lambda: engine.create_execution_context_without_device_memory(),
        lambda: config.int8_calibrator,
        lambda: fakes.fake("OnnxParser").supports_model(b""),
    )
    for use in dropped:
        if int(trt.__version__.split(".")[0]) >= 11:
            with fails(AttributeError):
                use()
        else:
            use()


def fake_refuses_our_own_code_with_a_dropped_flag():
    if int(trt.__version__.split(".")[0]) >= 11:
        with fails(AttributeError, "FP16"):
            build_here({}, flags={"FP16": True})
    with fails(AttributeError, "NO_SUCH_FLAG"):
        build_here({}, flags={"NO_SUCH_FLAG": True})


def main():
    report = {}
    for name, function in list(globals().items()):
        if name.startswith(("check_", "fake_")):
            try:
                function()
                report[name] = ""
            except Exception:
                report[name] = traceback.format_exc()
    print(json.dumps({"version": trt.__version__, "report": report, "used": sorted(CONTRACT.used)}))


main()
