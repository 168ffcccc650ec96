"""Building bundles: what is in them, what they compute, and that a failed build changes nothing."""

import hashlib
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

from geoengine.engine.backends import open_backend, tensorrt_runner
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError, BundleError, ExportError, MissingExtraError
from geoengine.engine.manifest import Variant
from geoengine.export import build, check, encoders, onnx_graphs, parity, reference, staging, work
from geoengine.export.build import build_engines
from geoengine.export.check import verify_bundle
from geoengine.export.config import BuildConfig
from geoengine.export.pictures import sample_pictures
from geoengine.export.staging import locked

torch.set_num_threads(1)
VISION = encoders.VisionConfig(
    image_size=16, patch_size=8, width=32, layers=3, heads=4, output_dim=24, quick_gelu=True
)
NAMES = ("photo", "z04", "z06")


def save_set(path: Path, *, seed: int = 5, changed: str | None = None) -> Path:
    """A folder of small random encoders; `changed` names one to give another projection."""
    torch.manual_seed(seed)
    trunk = VISION.build().state_dict()
    heads = {}
    for name in NAMES:
        state = VISION.build().state_dict()
        heads[name] = {key: t for key, t in state.items() if not encoders.in_trunk(key, 1)}
    if changed is not None:
        heads[changed]["proj"] = torch.randn(32, 24)
    encoders.save_encoder_folder(
        path, vision=VISION, trunk=trunk, heads=heads, trunk_layers=1,
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), logit_scale={"z04": 20.0, "z06": 30.5},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A bundle with trunks for 16 and 24 pixels, its report, and the folder it was built from."""
    folder = tmp_path_factory.mktemp("built")
    steps = []
    config = BuildConfig(encoder_folder=save_set(folder / "set"), out=folder / "bundle", input_sizes=(24,))
    report = build_engines(config, lambda *step: steps.append(step))
    return folder, report, steps


@pytest.fixture
def reuse(monkeypatch, built):
    """Let a build take its graphs from `built` instead of exporting: the same architecture, and quick."""
    source = built[0] / "bundle" / "onnx"

    def copy(folder: Path, start: str) -> list[Path]:
        return [Path(shutil.copy(file, folder)) for file in source.iterdir() if file.name.startswith(start)]

    def write_trunks(trunks, folder, variant):
        files = copy(folder, "trunk")
        return {side: next(f for f in files if f".{side}.fp32.onnx" in f.name) for side in trunks}

    def write_heads(heads, folder, variant):
        files = copy(folder, "head_")
        return {name: next(f for f in files if f"{name}.fp32.onnx" in f.name) for name, _ in heads}

    monkeypatch.setattr(onnx_graphs, "write_trunks", write_trunks)
    monkeypatch.setattr(onnx_graphs, "write_heads", write_heads)


def missing(package):
    """A `find_spec` that does not find a package."""
    found = importlib.util.find_spec
    return lambda name: None if name == package else found(name)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


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


def interrupted(config, at):
    """Build until a step whose name has `at` in it."""

    def interrupt(done: int, total: int, doing: str) -> None:
        if at in doing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(config, interrupt)


def test_an_interrupted_build_leaves_the_old_bundle_and_goes_on_where_it_stopped(built, reuse, tmp_path):
    shutil.copytree(built[0] / "bundle", tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("old")
    before = digests(tmp_path / "out")
    config = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out", input_sizes=(24,))
    interrupted(config, "check encoder z06")
    assert digests(tmp_path / "out") == before
    assert {file.name for file in tmp_path.iterdir()} == {"out", ".out.partial"}
    notes = (tmp_path / ".out.partial" / "notes.jsonl").open("a")
    notes.write('{"what": "onnxruntime-cpu fp')  # as if the power had failed
    notes.close()
    steps = []
    build_engines(config, lambda done, total, doing: steps.append(doing))
    assert not any(word in step for step in steps for word in ("export", "PyTorch"))
    assert "mark" not in digests(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert set(digests(tmp_path / "out")) == set(digests(built[0] / "bundle"))
    EngineBundle.open(tmp_path / "out")


def test_what_another_build_left_behind_is_not_used(built, reuse, tmp_path):
    interrupted(BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out"), "check encoder z06")
    (tmp_path / ".out.partial" / "onnx" / "old.onnx").write_bytes(b"old")
    steps = []
    other = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out", levels=(4,))
    build_engines(other, lambda done, total, doing: steps.append(doing))
    assert "export the trunk, fp32" in steps
    assert "onnx/old.onnx" not in digests(tmp_path / "out")


def test_two_builds_do_not_share_a_folder(built, tmp_path):
    config = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out")
    with locked(tmp_path / "out"), pytest.raises(ExportError, match=r"another build of .*out is running"):
        build_engines(config)


def test_a_full_disk_keeps_what_is_done(built, reuse, monkeypatch, tmp_path):
    def full(reference, file):
        raise OSError(28, "No space left on device", str(file))

    config = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(reference, "save_reference", full)
        with pytest.raises(ExportError, match=r"No space left .* kept in .*\.out\.partial, and the same"):
            build_engines(config)
    steps = []
    build_engines(config, lambda done, total, doing: steps.append(doing))
    assert not any("export" in step for step in steps)


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


def test_places_that_a_bundle_must_not_go(built, tmp_path, monkeypatch):
    def build_into(out: Path) -> None:
        build_engines(BuildConfig(encoder_folder=built[0] / "set", out=out))

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ExportError, match="photos exists and is not an engine bundle"):
        build_into(tmp_path / "photos")
    with pytest.raises(ExportError, match=r"a\.jpg is a file"):
        build_into(tmp_path / "photos" / "a.jpg")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ExportError, match="has 1 MB free, and the bundle may need 10 MB"):
        build_into(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["photos"]


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


def test_a_folder_that_cannot_be_made(built, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ExportError, match=r"file cannot be made \(File exists\): name another one with --out"
    ):
        build_engines(BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "file" / "b"))


def test_interrupted_plans_leave_a_whole_bundle_and_say_what_goes_on(built, monkeypatch, tmp_path):
    def interrupt(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "compile_bundle", interrupt)
    config = BuildConfig(
        encoder_folder=built[0] / "set", precisions=("fp16",), levels=(4,), out=tmp_path / "b"
    )
    with pytest.raises(KeyboardInterrupt, match=r"is whole, .*build-engines --plans --out .*b`"):
        build_engines(config)
    EngineBundle.open(tmp_path / "b")


class Killed(BaseException):
    """What nothing catches, as SIGKILL."""


@pytest.mark.parametrize("rename", [0, 1])
def test_a_build_killed_while_it_replaces_a_bundle_goes_on(built, reuse, monkeypatch, tmp_path, rename):
    shutil.copytree(built[0] / "bundle", tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("old")
    config = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out", input_sizes=(24,))
    renamed = []

    def killed(source, target):
        if len(renamed) == rename:
            raise Killed
        renamed.append(shutil.move(source, target))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            build_engines(config)
    steps = []
    build_engines(config, lambda done, total, doing: steps.append(doing))
    assert not any(word in step for step in steps for word in ("export", "PyTorch"))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert set(digests(tmp_path / "out")) == set(digests(built[0] / "bundle"))


def test_a_bundle_built_again_keeps_its_plans(built, reuse, tmp_path):
    shutil.copytree(built[0] / "bundle", tmp_path / "out")
    plans = tmp_path / "out" / "tensorrt" / "gpu"
    plans.mkdir(parents=True)
    for name in ("plans.json", "timing.cache", ".lock"):
        (plans / name).write_text(name)
    build_engines(BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out"))
    assert sorted(file.name for file in plans.iterdir()) == ["plans.json", "timing.cache"]
    build_engines(BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out", levels=(4,)))
    assert not plans.exists(), "they are of other encoders"


def test_graphs_that_were_cut_off_are_written_again(built, tmp_path):
    config = BuildConfig(
        encoder_folder=built[0] / "set", precisions=("int8",), levels=(4,), out=tmp_path / "out"
    )
    interrupted(config, "calibrate")
    folder = tmp_path / ".out.partial" / "onnx"
    (folder / "trunk.16.int8.onnx").write_bytes(b"\x08\x0a\x3a\xff")
    (folder / "trunk.weights").write_bytes(b"part")
    build_engines(config)
    EngineBundle.open(tmp_path / "out")


def test_a_lock_in_a_folder_that_has_gone_is_not_held(monkeypatch, tmp_path):
    target, calls = tmp_path / "out", []
    real = staging.fcntl.flock

    def another_build_ends_first(file, how):
        calls.append(how)
        if len(calls) == 1:
            shutil.rmtree(staging.staging_path(target))
        real(file, how)

    monkeypatch.setattr(staging.fcntl, "flock", another_build_ends_first)
    with locked(target):
        assert len(calls) == 2
        with pytest.raises(ExportError, match="is running"), locked(target):
            pass


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
