"""TensorRT plans without TensorRT: how they are kept, found and refused, and built by another process."""

import json
import re
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import external_data_helper
from tiny_bundle import write_manifest
from trt_contract.bundles import write_fp16_bundle

from geoengine.engine.backends import gpu, tensorrt_runner
from geoengine.engine.backends import tensorrt as backend_module
from geoengine.engine.backends.plans import Machine, find_plans, load_plans, read_plan
from geoengine.engine.backends.tensorrt import TensorRt
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError, ExportError
from geoengine.engine.manifest import BundleFile, Variant
from geoengine.export import check, parity, plan_builder
from geoengine.export import tensorrt as export_module
from geoengine.export.tensorrt import build_plans, mark_checked, plan_profiles, plan_settings, remove_plans

CHILD = (sys.executable, str(Path(__file__).parent / "trt_contract" / "plain_child.py"))
MACHINE = Machine(gpu="NVIDIA H100 80GB HBM3", compute_capability="9.0", driver="13.0", tensorrt="11.4.0.106")
FOLDER = "tensorrt/nvidia-h100-80gb-hbm3-sm90-trt11.4.0.106"
PLANS = ("trunk.8.plan", "trunk.16.plan", "head_photo.plan", "head_z01.plan", "head_z03.plan")


def find(bundle):
    return find_plans(bundle, MACHINE, unchecked=True)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_fp16_bundle(tmp_path_factory.mktemp("trt") / "bundle").path


@pytest.fixture
def bundle(pristine, tmp_path, monkeypatch):
    """A bundle of its own, on a machine that is said to be there, with a builder that needs no TensorRT."""
    shutil.copytree(pristine, tmp_path / "engines")
    monkeypatch.setattr(export_module, "_CHILD", CHILD)
    monkeypatch.setattr(export_module, "gpu_info", lambda: None)
    monkeypatch.setattr(export_module, "this_machine", lambda gpu: MACHINE)
    return EngineBundle.open(tmp_path / "engines")


@pytest.fixture
def built(bundle):
    build_plans(bundle, max_batch=64)
    return bundle


def test_plans_lie_in_the_machines_folder(bundle):
    reports = build_plans(bundle, max_batch=64)
    assert [report.artifact for report in reports] == [f"{FOLDER}/{plan}" for plan in PLANS]
    assert [report.reused for report in reports] == [False] * 5
    assert {report.seconds for report in reports} == {0.25}
    files = {file.name for file in (bundle.path / FOLDER).iterdir()}
    assert files == {*PLANS, "plans.json", ".lock"}
    profiles = {plan.profiles for plan in find(bundle).plans.values()}
    assert profiles == {((1, 8, 32), (33, 64, 64))}


def test_large_pictures_have_smaller_batches(bundle, monkeypatch):
    monkeypatch.setattr(gpu, "SLOT_BYTES", 3 * 16 * 16 * 40)
    build_plans(bundle, max_batch=64)
    largest = {graph: plan.profiles[-1][2] for graph, plan in find(bundle).plans.items()}
    assert largest.pop("onnx/trunk.16.fp16.onnx") == 40
    assert set(largest.values()) == {64}


def test_progress_counts_hundredths_of_plans(bundle):
    seen = []
    build_plans(bundle, max_batch=64, progress=lambda *step: seen.append(step))
    assert seen[0] == (0, 500, "trunk.8.plan: start TensorRT")
    assert (250, 500, "head_photo.plan: Timing") in seen
    assert seen[-1] == (500, 500, "")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_a_second_build_uses_what_is_there(built, monkeypatch):
    monkeypatch.setattr(export_module, "_CHILD", ("false",))
    assert all(report.reused for report in build_plans(built, max_batch=64))


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (
            "crash 2",
            ["SIGKILL", "head_photo.plan", "out of something", "run the command again", "--max-batch"],
        ),
        ("raise 2", ["exit status 1", "head_photo.plan", "No space left on device"]),
        ("fail 2", ["node 'blk.3' is odd"]),
    ],
)
def test_a_build_that_fails_is_taken_up_again(bundle, monkeypatch, mode, words):
    monkeypatch.setenv("CHILD_MODE", mode)
    with pytest.raises(ExportError) as failed:
        build_plans(bundle, max_batch=64)
    assert all(word in str(failed.value) for word in words), failed.value
    with pytest.raises(BackendError, match=re.escape("there is none for onnx/head_photo.fp16.onnx")):
        find(bundle)
    monkeypatch.delenv("CHILD_MODE")
    assert [report.reused for report in build_plans(bundle, max_batch=64)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not list((bundle.path / FOLDER).glob(".*.tmp"))


def test_interrupting_ends_the_builder_in_good_order(bundle, monkeypatch):
    monkeypatch.setenv("CHILD_MODE", "wait 1")

    def interrupt(done, total, doing):
        if "trunk.16.plan: Timing" in doing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plans(bundle, max_batch=64, progress=interrupt)
    assert (bundle.path / FOLDER / "timing.cache").read_text() == "stopped in good order"
    monkeypatch.delenv("CHILD_MODE")
    assert [report.reused for report in build_plans(bundle, max_batch=64)] == [True] + [False] * 4


def test_a_builder_that_does_not_listen_is_killed(bundle, monkeypatch):
    monkeypatch.setattr(export_module, "_CHILD", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(export_module, "_GRACE_SECONDS", 0.2)

    def interrupt(done, total, doing):
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_plans(bundle, max_batch=64, progress=interrupt)
    assert time.monotonic() - start < 20


def test_a_builder_that_ends_before_it_reads_its_job(bundle, monkeypatch):
    monkeypatch.setattr(export_module, "_CHILD", ("true",))
    with pytest.raises(ExportError, match=r"ended with exit status 0 at trunk.8.plan; it last said: nothing"):
        build_plans(bundle, max_batch=64)


def test_one_build_at_a_time(bundle):
    folder = bundle.path / FOLDER
    folder.mkdir(parents=True)
    seen, reports = [], []

    def build():
        reports.extend(build_plans(bundle, max_batch=64, progress=lambda *step: seen.append(step)))

    with export_module._locked(folder, lambda: pytest.fail("nobody else holds the lock")):
        other = threading.Thread(target=build)
        other.start()
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen == [(0, 0, "wait for another process that builds plans here")]
    other.join(30)
    assert len(reports) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: {"level": 5},
        lambda patch: {"max_batch": 128},
        lambda patch: patch(export_module, "this_machine", lambda gpu: replace(MACHINE, driver="13.2")) or {},
        lambda patch: patch(export_module, "FLAGS", {"TF32": True}) or {},
    ],
)
def test_what_decides_a_plan_makes_another_one(built, monkeypatch, change):
    settings = {"max_batch": 64} | change(monkeypatch.setattr)
    assert not any(report.reused for report in build_plans(built, **settings))


def test_another_gpu_or_tensorrt_has_its_own_folder(built, monkeypatch):
    newer = replace(MACHINE, tensorrt="11.5.0.1")
    monkeypatch.setattr(export_module, "this_machine", lambda gpu: newer)
    build_plans(built, max_batch=64)
    assert len(list((built.path / "tensorrt").iterdir())) == 2
    for machine in (MACHINE, newer):
        assert find_plans(built, machine, unchecked=True).machine == machine


def test_other_weights_make_other_plans(built):
    file = built.path / "onnx" / "head_z01.fp16.onnx"
    shutil.copy(built.path / "onnx" / "head_z03.fp16.onnx", file)
    write_manifest(built.path, json.loads((built.path / "manifest.json").read_text()))
    changed = EngineBundle.open(built.path)
    with pytest.raises(BackendError, match=r"head_z01.plan was built from another onnx/head_z01.fp16.onnx"):
        find(changed)
    reused = [report.graph for report in build_plans(changed, max_batch=64) if not report.reused]
    assert reused == ["onnx/head_z01.fp16.onnx"]


def test_weight_files_are_sources_too(bundle):
    file = bundle.path / "onnx" / "head_z03.fp16.onnx"
    model = onnx.load(file)
    external_data_helper.convert_model_to_external_data(model, location="heads.weights", size_threshold=0)
    onnx.save(model, file)
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    write_manifest(bundle.path, manifest)
    with pytest.raises(ExportError, match=r"points to onnx/heads.weights, which the manifest"):
        build_plans(EngineBundle.open(bundle.path), max_batch=64)
    manifest["files"]["onnx/heads.weights"] = {
        "bytes": (file.parent / "heads.weights").stat().st_size,
        "sha256": "ab" * 32,
    }
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    build_plans(EngineBundle.open(bundle.path, verify=False), max_batch=64)
    sources = load_plans(bundle.path / FOLDER).plans["onnx/head_z03.fp16.onnx"].sources
    assert sources["onnx/heads.weights"] == "ab" * 32


def test_only_nodes_that_resize_may_compute_in_fp32(tmp_path):
    from made_encoders import SMALL, write_encoder

    (tmp_path / "onnx").mkdir()
    files = write_encoder(SMALL.build(), tmp_path / "onnx", variant=Variant.fp16, sides=(16, 24))
    known = {file.relative_to(tmp_path).as_posix(): BundleFile(1, "ab") for file in tmp_path.rglob("*.*")}
    graphs = {Variant.fp16: SimpleNamespace(trunks={})}
    bundle = SimpleNamespace(path=tmp_path, manifest=SimpleNamespace(files=known, graphs=graphs))
    exact = {}
    for part, file in files.items():
        graph = file.relative_to(tmp_path).as_posix()
        exact[part] = export_module._read(bundle, graph, 64).exact
        nodes = {node.name: node.op_type for node in onnx.load(file, load_external_data=False).graph.node}
        assert len(nodes) > 10 and "" not in nodes
        assert [nodes[name] for name in exact[part]] == ["MatMul"] * len(exact[part])
    assert {part: len(names) for part, names in exact.items()} == {16: 0, 24: 4, "head": 0}


def test_damaged_plans_are_refused_and_built_again(built):
    plans = find(built)
    file = built.path / FOLDER / "head_photo.plan"
    whole = file.read_bytes()
    rebuild = f"geoengine build-engines --plans --out {built.path}"
    file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(BackendError, match="SHA-256.*" + re.escape(rebuild)):
        read_plan(built, plans, "onnx/head_photo.fp16.onnx")
    file.write_bytes(whole[:-1])
    with pytest.raises(BackendError, match=r"head_photo.plan is damaged: it has \d+ bytes instead of \d+"):
        find(built)
    file.unlink()
    with pytest.raises(BackendError, match=r"head_photo.plan is missing"):
        find(built)
    reports = build_plans(built, max_batch=64)
    assert [report.artifact for report in reports if not report.reused] == [f"{FOLDER}/head_photo.plan"]
    assert read_plan(built, find(built), "onnx/head_photo.fp16.onnx") == whole


def test_plans_are_used_only_after_they_were_checked(built):
    with pytest.raises(
        BackendError, match=r"have not been checked, because their build was interrupted: .*--plans"
    ):
        find_plans(built, MACHINE)
    mark_checked(built)
    assert find_plans(built, MACHINE).checked
    (built.path / FOLDER / "head_photo.plan").unlink()
    build_plans(built, max_batch=64)
    with pytest.raises(BackendError, match="have not been checked"):
        find_plans(built, MACHINE)


@pytest.mark.parametrize("gate", [0.5, 0.0])
def test_the_gates_decide_whether_plans_stay(bundle, monkeypatch, gate):
    class Fails:
        name, variant, batch, max_batch = "tensorrt", Variant.fp16, 32, 64

        def __init__(self, bundle, **options):
            assert options == {"precision": "fp16", "unchecked": True}

        def encode(self, encoder, pixels):
            return np.eye(1, bundle.embed_dim, dtype=np.float32).repeat(len(pixels), axis=0)

        def close(self):
            pass

    monkeypatch.setattr(backend_module, "TensorRt", Fails)
    monkeypatch.setattr(parity, "MIN_COSINE", {Variant.fp16: gate})
    embeddings = np.full((32, bundle.embed_dim), 0.1, np.float32)
    monkeypatch.setattr(
        check, "load_reference", lambda file: dict.fromkeys(check.pairs_of(bundle), embeddings)
    )
    if gate:
        with pytest.raises(ExportError, match="does not agree with PyTorch"):
            check.compile_bundle(bundle.path, max_batch=64)
        assert not (bundle.path / FOLDER).exists()
    else:
        check.compile_bundle(bundle.path, max_batch=64)
        assert find_plans(bundle, MACHINE).checked


def test_a_check_without_room_on_the_gpu_keeps_the_plans_unchecked(bundle, monkeypatch):
    class Full:
        def __init__(self, bundle, **options):
            raise BackendError("the GPU has no room")

    monkeypatch.setattr(backend_module, "TensorRt", Full)
    monkeypatch.setattr(check, "load_reference", lambda file: dict.fromkeys(check.pairs_of(bundle)))
    with pytest.raises(BackendError, match="no room"):
        check.compile_bundle(bundle.path, max_batch=64)
    assert (bundle.path / FOLDER).exists()
    with pytest.raises(BackendError, match="--plans"):
        find_plans(bundle, MACHINE)


def swap(old, new):
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[:-20], "Expecting|Unterminated"),
        (lambda text: "[]", "lacks or misspells a field"),
        (swap('"schema": 1', '"schema": 2'), "schema 2 is not 1"),
        (swap('"level"', '"levels"'), "lacks or misspells a field"),
        (swap('"level": 3', '"level": 4'), "the key of trunk.8.plan does not fit"),
        (swap('"trunk.8.plan"', '"../trunk.8.plan"'), "is no file name of a plan"),
        (
            swap('"scratch_bytes": 1000', '"scratch_bytes": "many"'),
            "scratch_bytes.*must be a size, got 'many'",
        ),
        (lambda text: text.replace("33,", "32,"), "rising batch sizes"),
    ],
)
def test_a_damaged_list_of_plans_is_refused_and_made_again(built, damage, words):
    file = built.path / FOLDER / "plans.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(BackendError, match=rf"plans.json cannot be used: .*({words})"):
        find(built)
    assert not any(report.reused for report in build_plans(built, max_batch=64))
    find(built)


def test_plans_for_other_machines_are_named(built):
    with pytest.raises(BackendError) as refused:
        find_plans(built, replace(MACHINE, gpu="NVIDIA A100", compute_capability="8.0"))
    assert "no TensorRT plans for NVIDIA A100 (compute capability 8.0) with TensorRT 11.4.0.106" in str(
        refused.value
    )
    assert "it has NVIDIA H100 80GB HBM3 (compute capability 9.0) with TensorRT 11.4.0.106" in str(
        refused.value
    )
    assert f"geoengine build-engines --plans --out {built.path}" in str(refused.value)
    with pytest.raises(BackendError, match=r"driver for CUDA 13.0, and this one is for CUDA 12.9"):
        find_plans(built, replace(MACHINE, driver="12.9"))
    remove_plans(built)
    assert not (built.path / FOLDER).exists()
    with pytest.raises(BackendError, match="it has none at all"):
        find(built)


def test_a_bundle_without_fp16_graphs(bundle):
    file = bundle.path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["graphs"] = {"fp32": manifest["graphs"]["fp16"]}
    file.write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"no fp16 graphs.*--precision fp16"):
        build_plans(EngineBundle.open(bundle.path), max_batch=64)


def test_a_full_disk_is_said_before_the_work(bundle, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ExportError, match="make room"):
        build_plans(bundle, max_batch=64)


@pytest.mark.parametrize(
    ("max_batch", "profiles"),
    [
        (1, ((1, 2, 2),)),
        (8, ((1, 8, 8),)),
        (32, ((1, 8, 32),)),
        (33, ((1, 8, 32), (33, 33, 33))),
        (1024, ((1, 8, 32), (33, 256, 1024))),
    ],
)
def test_profiles_cover_every_batch(max_batch, profiles):
    assert plan_profiles(max_batch) == profiles


@pytest.mark.parametrize(("max_batch", "level"), [(7, 3), (4097, 3), (64, -1), (64, 6)])
def test_impossible_settings_are_refused(max_batch, level):
    with pytest.raises(ExportError, match="must be from"):
        plan_settings(max_batch, level)


LAYER = {"Name": "node_matmul_7_myl0", "LayerType": "gemm", "TacticName": "", "Inputs": [], "Outputs": []}


def told(kind):
    return [{"Name": "float", "Dimensions": [8, 50, 768], "Format/Datatype": kind}]


@pytest.mark.parametrize(
    ("layer", "fine"),
    [
        ({"Inputs": told("Half")}, True),
        ({"Inputs": told("Half"), "Outputs": told("Float")}, True),  # the residual sum, fused
        ({"Inputs": told("Float")}, False),
        ({"Inputs": told("Float"), "Name": "node_matmul_1_myl0"}, True),  # it may be
        ({"Inputs": told("Float"), "Name": "node_matmul_12_myl0"}, False),
        ({"Inputs": told("Row major linear FP16 format")}, True),
        ({"Inputs": told("Row major linear FP32")}, False),
        ({"TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_tn"}, True),
        ({"TacticName": "sm80_xmma_gemm_f32f32_tf32f32_f32_tn"}, False),
        ({"LayerType": "kgen", "TacticName": "__myl_MulAdd", "Inputs": told("Float")}, True),
        ({"LayerType": "kgen", "TacticName": "ampere_sgemm_128x64_nn"}, False),
        ({"LayerType": "MatrixMultiply", "Inputs": told("Float")}, False),
    ],
)
def test_fp32_matrix_products_of_a_plan_are_found(layer, fine):
    attention = {"LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x1"}
    again = attention | {"Name": "__mye_12 [profile 1]"}
    text = json.dumps({"Layers": [LAYER | layer, attention, again]})
    if fine:
        assert plan_builder.check_layers(text, "trunk.onnx", ["node_matmul_1"]) == 1
    else:
        with pytest.raises(ExportError, match=r"fp32 matrix product in trunk.onnx: layer 'node_matmul_"):
            plan_builder.check_layers(text, "trunk.onnx", ["node_matmul_1"])


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["only", "names"]}', '{"Layers": 3}'])
def test_a_plan_that_does_not_describe_itself_is_refused(text):
    with pytest.raises(ExportError, match=r"TensorRT (does not say|names no layers)"):
        plan_builder.check_layers(text, "trunk.onnx", [])


def test_nested_phases_make_one_share():
    class Base:
        def __init__(self):
            pass

    seen, stop = [], plan_builder.Stop()
    monitor = plan_builder.progress_monitor(
        SimpleNamespace(IProgressMonitor=Base), lambda phase, share: seen.append((phase, share)), stop
    )
    monitor.phase_start("build", None, 4)
    assert monitor.step_complete("build", 0)
    monitor.phase_start("time", "build", 2)
    assert monitor.step_complete("time", 0)
    monitor.phase_finish("time")
    stop.wanted = True
    assert not monitor.step_complete("build", 1)
    assert seen == [("build", 0.25), ("time", 0.375), ("build", 0.5)]


def test_a_bundle_without_plans_is_refused_before_tensorrt_is_loaded(bundle, monkeypatch):
    monkeypatch.setattr(tensorrt_runner.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(BackendError, match=r"has no TensorRT plans: build them here with"):
        TensorRt(bundle)


def test_missing_tensorrt_is_said_with_the_command(built, monkeypatch):
    monkeypatch.setattr(tensorrt_runner.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=re.escape("pip install 'geoengine[tensorrt]'")):
        TensorRt(built)


def test_tensorrt_whose_libraries_do_not_load_is_said(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("raise FileNotFoundError('libnvinfer.so.11')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendError, match=r"cannot be loaded \(libnvinfer.so.11\).*geoengine\[tensorrt\]"):
        tensorrt_runner.load_tensorrt()
