"""Building bundles: what is in them, what they compute, and what is refused."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from made_builds import NAMES, build_small, digests, reuse_graphs, save_set

from geoengine.engine.backends import open_backend, tensorrt_runner
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError, BundleError, ExportError, MissingExtraError
from geoengine.engine.manifest import Variant
from geoengine.export import check, encoders, parity, reference, work
from geoengine.export.build import build_engines
from geoengine.export.check import verify_bundle
from geoengine.export.config import BuildConfig
from geoengine.export.pictures import sample_pictures

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A bundle's folder, its report, and the steps that were told."""
    return build_small(tmp_path_factory.mktemp("built"))


@pytest.fixture
def reuse(monkeypatch, built):
    reuse_graphs(monkeypatch, built[0] / "bundle" / "onnx")


def missing(package):
    """A `find_spec` that does not find a package."""
    found = importlib.util.find_spec
    return lambda name: None if name == package else found(name)


def test_the_manifest_tells_what_is_in_the_bundle(built):
    folder, report, _ = built
    bundle = EngineBundle.open(folder / "bundle")
    manifest = bundle.manifest
    assert (manifest.world, manifest.levels, manifest.model) == ("planet", (4, 6), "planet-vit")
    assert (manifest.embed_dim, manifest.image_size, bundle.variants) == (24, 16, ("fp32",))
    assert dict(manifest.logit_scale) == {"z04": 20.0, "z06": 30.5}
    graphs = manifest.graphs["fp32"]
    assert (sorted(graphs.trunks), sorted(graphs.heads)) == ([16, 24], sorted(NAMES))
    assert {"manifest.json", *manifest.files} == set(digests(folder / "bundle"))
    assert set(manifest.tools) == {"torch", "open_clip", "onnx", "onnx_ir", "onnxruntime"}
    assert len(manifest.weights) == 64
    for name in NAMES:
        assert (
            0.9999
            <= manifest.parity["fp32"][name]["min_cosine"]
            <= manifest.parity["fp32"][name]["mean_cosine"]
        )
        assert manifest.parity["fp32"][name]["images"] == (62 if name == "photo" else 31)
    assert report.bytes == sum(f.stat().st_size for f in (folder / "bundle").rglob("*") if f.is_file())
    assert {row.artifact for row in report.rows} == set(graphs.files())
    assert {row.backend for row in report.rows} == {"onnxruntime-cpu"}
    assert not report.random


def test_progress_counts_every_step(built):
    steps = built[2]
    assert steps[0] == (0, 0, "load the encoders")
    assert [done for done, _, _ in steps] == list(range(12))
    assert {total for _, total, _ in steps[3:]} == {11}
    assert steps[-1] == (11, 11, "")


@pytest.mark.parametrize("side", [16, 24, 40])
@pytest.mark.parametrize("name", NAMES)
def test_embeddings_equal_those_of_open_clip(built, side, name):
    folder = built[0]
    original = encoders.load_encoder_folder(folder / "set")
    pictures = sample_pictures(side, 35, seed=9)
    backend = open_backend(EngineBundle.open(folder / "bundle"), backend="onnxruntime-cpu", threads=1)
    found = backend.encode(name, pictures)
    expected = reference.reference_embeddings(original, name, pictures)
    np.testing.assert_allclose(found, expected, atol=3e-4)  # a pixel may round to the other side
    assert (found * expected).sum(1).min() > 0.9999
    np.testing.assert_allclose(backend.encode(name, pictures[34:]), found[34:], atol=1e-6)
    backend.close()


def test_trunks_share_their_weights_stored_as_half(built):
    folder = built[0] / "bundle" / "onnx"
    regions = []
    for side in (16, 24):
        graph = onnx.load(folder / f"trunk.{side}.fp32.onnx", load_external_data=False).graph
        external = {t.name: t for t in graph.initializer if t.external_data}
        assert {e.value for t in external.values() for e in t.external_data if e.key == "location"} == {
            "trunk.weights"
        }
        regions.append({n: [(e.key, e.value) for e in t.external_data] for n, t in external.items()})
        half = {name for name, t in external.items() if t.data_type == onnx.TensorProto.FLOAT16}
        assert half == {
            f"{n}.half" for n in ("w_patch", *(f"blocks.0.w_{w}" for w in ("qkv", "out", "up", "down")))
        }
        assert any(t.name.startswith("resize_") for t in graph.initializer) == (side == 24)
    assert regions[0] == regions[1]


def test_graphs_have_a_dynamic_batch_and_tell_nothing_of_this_machine(built):
    for file in (built[0] / "bundle" / "onnx").glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        for value in [*graph.input, *graph.output]:
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
        for word in (b"stack_trace", b".py", b"geoengine"):
            assert word not in file.read_bytes()


def test_a_build_of_fewer_levels_writes_the_same_bytes(built, tmp_path):
    config = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "b", levels=(6,))
    build_engines(config)
    ours, theirs = digests(tmp_path / "b"), digests(built[0] / "bundle")
    left_out = {"onnx/head_z04.fp32.onnx", "onnx/head_z04.weights", "onnx/trunk.24.fp32.onnx"}
    assert set(theirs) - set(ours) == left_out
    assert all(ours[name] == theirs[name] for name in ours if name.startswith("onnx/"))


def test_an_encoder_that_disagrees_stops_the_build(built, reuse, tmp_path):
    config = BuildConfig(encoder_folder=save_set(tmp_path / "set", changed="z06"), out=tmp_path / "out")
    with pytest.raises(ExportError, match=r"encoder z06 at 16 px .* does not agree with PyTorch"):
        build_engines(config)
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


class FakeBackend:
    """Gives one embedding for all, spoilt by `spoil(embeddings)`."""

    name, variant, batch, max_batch = "fake", Variant.fp32, 40, 50

    def __init__(self, spoil):
        self.spoil = spoil

    def encode(self, encoder, pixels):
        embeddings = np.zeros((len(pixels), 24), np.float32)
        embeddings[:, 0] = 1
        return self.spoil(embeddings)

    def close(self):
        pass


def last_differs(embeddings):
    if len(embeddings) > 1:
        embeddings[-1, 1] = 3e-5
    return embeddings


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (last_differs, r"photo at 16 px on fake \(fp32\): an embedding depends on its batch .* 3e-05"),
        (lambda embeddings: embeddings * 1.01, "not of unit length"),
        (lambda embeddings: embeddings * np.nan, "not of unit length"),
    ],
)
def test_gates_on_batch_and_length(spoil, message):
    expected = np.eye(1, 24, dtype=np.float32).repeat(reference.PICTURES, axis=0)
    with pytest.raises(ExportError, match=message):
        parity.measure(FakeBackend(spoil), "photo", 16, expected)
    parity.measure(FakeBackend(lambda embeddings: embeddings), "photo", 16, expected)


def test_verify_accepts_a_good_bundle_and_finds_damage(built, tmp_path):
    report = verify_bundle(built[0] / "bundle")
    assert [row.artifact for row in report.rows] == [row.artifact for row in built[1].rows]
    assert [row.min_cosine for row in report.rows] == pytest.approx([row.min_cosine for row in built[1].rows])
    assert report.bytes == built[1].bytes
    shutil.copytree(built[0] / "bundle", tmp_path / "out")
    weights = tmp_path / "out" / "onnx" / "trunk.weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(BundleError, match=r"trunk\.weights is damaged"):
        verify_bundle(tmp_path / "out")
    with pytest.raises(BundleError, match="no engine bundle"):
        verify_bundle(tmp_path)


def test_verify_wants_something_to_compare_every_encoder_with(built, monkeypatch):
    known = reference.load_reference(built[0] / "bundle" / "reference.npz")
    monkeypatch.delitem(known, ("z06", 16))
    monkeypatch.setattr(check, "load_reference", lambda file: known)
    with pytest.raises(ExportError, match="has no embeddings of encoder z06 at 16 px"):
        verify_bundle(built[0] / "bundle")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ("fp16", "fp8")}, "unknown precision 'fp8': there are fp32, fp16, int8"),
        ({"backend": "cuda"}, "unknown backend 'cuda': there are auto, .*onnxruntime-cpu"),
        ({"max_batch": 0}, "the largest batch must be from 8 to 4096, got 0"),
        ({"calibration": Path("nowhere")}, "folder of pictures for calibration, nowhere, does not exist"),
        ({"checkpoints": Path("a"), "encoder_folder": Path("b")}, "not both"),
        ({"input_sizes": (0,)}, "from 1 to 4096 pixels"),
        ({"levels": ()}, "levels must increase strictly"),
        ({"levels": (6, 4)}, "levels must increase strictly"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ExportError, match=message):
        BuildConfig(**options)


def test_levels_that_the_encoders_do_not_have(built, tmp_path):
    with pytest.raises(ExportError, match="has no head for z08"):
        build_engines(BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "b", levels=(4, 8)))


def test_without_the_export_extra_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", missing("onnx"))
    with pytest.raises(MissingExtraError, match=r"needs onnx, which .* `pip install 'geoengine\[export\]'`"):
        build_engines(BuildConfig(out=tmp_path / "b"))


def test_earth_bundles_take_the_usual_tile_sizes(monkeypatch):
    class Earth:
        world, image_size = "earth", 224

    assert work._sides(BuildConfig(), Earth()) == (224, 256, 512)
    assert work._sides(BuildConfig(input_sizes=()), Earth()) == (224,)


def test_importing_the_configuration_loads_no_torch():
    code = "import sys, geoengine.export.build; print({'torch', 'onnx', 'open_clip'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert result.stdout.strip() == "set()"


def test_a_bundle_of_all_precisions_is_run_by_every_backend_of_this_machine(built, tmp_path):
    config = BuildConfig(
        encoder_folder=built[0] / "set", precisions=("int8", "fp16"), levels=(6,), out=tmp_path / "b"
    )
    report = build_engines(config)
    bundle = EngineBundle.open(tmp_path / "b")
    assert bundle.variants == (Variant.fp16, Variant.fp16_attention, Variant.int8)
    assert not list((tmp_path / "b").rglob("*.fp32.onnx")), "what int8 was made from is not part of it"
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"manifest.json", "reference.npz", "onnx"}
    ran = {(row.backend, row.variant) for row in report.rows}
    assert ran == {
        ("openvino", "int8"),
        *(("onnxruntime-cpu", variant) for variant in ("fp16", "fp16-attention", "int8")),
    }
    assert min(row.min_cosine for row in report.rows) >= 0.995
    assert {"tensorrt", "onnxruntime-cuda"} == {name for name, _ in report.skipped}
    with_backend = open_backend(bundle)
    assert (with_backend.name, with_backend.variant) == ("openvino", "int8")
    with_backend.close()
    steps = []
    verify_bundle(tmp_path / "b", lambda done, total, doing: steps.append(doing))
    assert "check encoder z06 at 16 px on openvino, int8" in steps


@pytest.mark.parametrize(
    ("backend", "precision", "message"),
    [
        ("openvino", "fp32", "backend openvino does not compute in fp32, only in int8"),
        ("tensorrt", "int8", "backend tensorrt does not compute in int8, only in fp16"),
        ("tensorrt", "fp16", "TensorRT is not installed"),
        ("onnxruntime-cuda", "fp16", "this ONNX Runtime has no CUDAExecutionProvider"),
    ],
)
def test_a_backend_that_cannot_run_here_is_refused_before_the_work(
    built, monkeypatch, tmp_path, backend, precision, message
):
    monkeypatch.setattr(tensorrt_runner.importlib.util, "find_spec", missing("tensorrt"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    config = BuildConfig(
        encoder_folder=built[0] / "set", precisions=(precision,), backend=backend, out=tmp_path / "b"
    )
    steps = []
    with pytest.raises(BackendError, match=message):
        build_engines(config, lambda done, total, doing: steps.append(doing))
    assert steps == ["load the encoders"]
    assert list(tmp_path.iterdir()) == []


def test_the_faster_of_two_forms_is_preferred_on_a_gpu():
    def measured(backend, variant, speed):
        return parity.Measurement(
            backend=backend, variant=variant, encoder="z04", side=16, cosines=(), images_per_second=speed
        )

    cpu = measured("onnxruntime-cpu", Variant.fp16_attention, 9000.0)
    both = [measured("onnxruntime-cuda", Variant.fp16, 40.0), measured("onnxruntime-cuda", Variant.fp16, 5.0)]
    both += [measured("onnxruntime-cuda", Variant.fp16_attention, 9.0)] * 2
    assert work._preferred([cpu]) == {}
    assert work._preferred([cpu, *both]) == {"onnxruntime-cuda": "fp16-attention"}
