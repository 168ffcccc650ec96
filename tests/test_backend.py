"""The backend contract, on ONNX Runtime on the CPU."""

import json
import logging
import shutil
import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import EMBED_DIM, IMAGE_SIZE, write_manifest, write_tiny_bundle

from geoengine.engine.backends import BACKENDS, open_backend
from geoengine.engine.backends import onnxruntime as module
from geoengine.engine.backends.onnxruntime import MAX_BATCH
from geoengine.engine.backends.sessions import Sessions
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.cores import available_cores, cgroup_quota
from geoengine.engine.errors import BackendError, BundleError
from geoengine.engine.preprocess import to_square


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return EngineBundle.open(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny"))


@pytest.fixture
def backend(bundle):
    opened = open_backend(bundle, backend="onnxruntime-cpu", threads=2)
    yield opened
    opened.close()


def pictures(count, side=IMAGE_SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_embeddings_are_unit_rows_of_their_encoder(backend):
    pixels = pictures(3)
    embeddings = {encoder: backend.encode(encoder, pixels) for encoder in ("photo", "z01", "z03")}
    for rows in embeddings.values():
        assert (rows.dtype, rows.shape) == (np.float32, (3, EMBED_DIM))
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert abs(embeddings["photo"] - embeddings["z01"]).max() > 0.1
    assert abs(embeddings["photo"][0] - embeddings["photo"][1]).max() > 0.01


@pytest.mark.parametrize("count", [0, 1, MAX_BATCH, MAX_BATCH + 1, 3 * MAX_BATCH + 5])
def test_any_number_of_pictures(backend, count):
    assert backend.encode("z01", pictures(count)).shape == (count, EMBED_DIM)


@pytest.mark.parametrize("side", [IMAGE_SIZE, 16, 20])
@pytest.mark.parametrize("place", [0, 7, MAX_BATCH - 1])
def test_an_embedding_does_not_depend_on_its_batch(backend, side, place):
    pixels = pictures(MAX_BATCH, side)
    alone = backend.encode("z03", pixels[place : place + 1])[0]
    for seed in (1, 2):
        batch = pictures(MAX_BATCH, side, seed)
        batch[place] = pixels[place]
        np.testing.assert_allclose(backend.encode("z03", batch)[place], alone, rtol=0, atol=1e-6)
    np.testing.assert_allclose(backend.encode("z03", pixels)[place], alone, rtol=0, atol=1e-6)


def test_a_large_call_equals_its_parts(backend):
    pixels = pictures(2 * MAX_BATCH + 3)
    parts = [backend.encode("z01", pixels[i : i + 5]) for i in range(0, len(pixels), 5)]
    np.testing.assert_allclose(backend.encode("z01", pixels), np.concatenate(parts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("counts", [(1, 2, 3, 4), (0, 40, 0, 3), (16, 16, 1, 30)])
def test_groups_of_several_encoders_share_trunk_batches(backend, counts):
    names, sides = ("z01", "photo", "z03", "z01"), (IMAGE_SIZE, IMAGE_SIZE, 20, 16)
    groups = [
        (name, pictures(count, side, seed))
        for seed, (name, count, side) in enumerate(zip(names, counts, sides, strict=True))
    ]
    found = backend.encode_mixed(groups)
    for (name, pixels), rows in zip(groups, found, strict=True):
        np.testing.assert_allclose(rows, backend.encode(name, pixels), rtol=0, atol=1e-6)
    assert backend.encode_mixed([]) == []
    with pytest.raises(BundleError, match="no encoder 'z02'"):
        backend.encode_mixed([*groups, ("z02", pictures(1))])


def test_the_trunk_runs_once_for_pictures_of_several_encoders(backend, bundle, monkeypatch):
    ran, run = [], backend._run
    monkeypatch.setattr(backend, "_run", lambda path, *rest: ran.append(path.name) or run(path, *rest))
    backend.encode_mixed([("z01", pictures(5)), ("z03", pictures(6)), ("photo", pictures(9))])
    heads = [bundle.head_path(name, "fp32").name for name in ("z01", "z03", "photo", "photo")]
    trunk = bundle.trunk_path(IMAGE_SIZE, "fp32").name
    assert ran == [trunk, *heads[:3], trunk, heads[3]]


def test_the_trunk_is_picked_by_the_pictures_side(backend, bundle):
    backend.encode("z01", pictures(1, 16))
    assert backend._sessions.paths() == {bundle.trunk_path(16, "fp32"), bundle.head_path("z01", "fp32")}


def test_pictures_without_a_trunk_are_resized(backend, bundle):
    pixels = pictures(3, 20)
    resized = np.stack([to_square(picture, IMAGE_SIZE) for picture in pixels])
    np.testing.assert_array_equal(backend.encode("z01", pixels), backend.encode("z01", resized))
    assert backend._sessions.paths() == {
        bundle.trunk_path(IMAGE_SIZE, "fp32"),
        bundle.head_path("z01", "fp32"),
    }


def test_pictures_need_not_be_contiguous(backend):
    pixels = pictures(4, 16)
    np.testing.assert_array_equal(
        backend.encode("z01", pixels[::2, ::2, ::2]), backend.encode("z01", pixels[::2, ::2, ::2].copy())
    )


@pytest.mark.parametrize(
    "pixels",
    [pictures(1).astype(np.float32), pictures(1)[0], pictures(1)[:, :4], pictures(1)[..., :1]],
)
def test_pictures_of_a_wrong_shape_or_type(backend, pixels):
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(n, S, S, 3\), got"):
        backend.encode("z01", pixels)


def test_an_unknown_encoder_names_those_there_are(backend):
    with pytest.raises(BundleError, match=r"no encoder 'z16'; it has photo, z01, z03"):
        backend.encode("z16", pictures(1))


def test_threads_share_sessions_that_are_loaded_once(backend, monkeypatch):
    loads, expected = [], {}
    load = Sessions._load
    monkeypatch.setattr(Sessions, "_load", lambda self, path: loads.append(path) or load(self, path))
    results = {}

    def work(i):
        results[i] = backend.encode("z01", pictures(20, seed=i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == len(set(loads)) == 2
    for i in range(4):
        expected[i] = backend.encode("z01", pictures(20, seed=i))
        np.testing.assert_array_equal(results[i], expected[i])


def test_a_closed_backend_says_so(bundle):
    opened = open_backend(bundle)
    opened.encode("z01", pictures(1))
    opened.close()
    with pytest.raises(BackendError, match="backend onnxruntime-cpu is closed"):
        opened.encode("z01", pictures(1))


# --- opening ----------------------------------------------------------------------------------------------


def test_auto_logs_its_choice_once(bundle, caplog):
    with caplog.at_level(logging.INFO):
        opened = open_backend(bundle, threads=3)
        opened.encode("z01", pictures(1))
    assert [record.message for record in caplog.records] == ["backend onnxruntime-cpu, fp32"]


def test_a_named_backend_logs_nothing(bundle, caplog):
    with caplog.at_level(logging.INFO):
        assert open_backend(bundle, backend="onnxruntime-cpu").name == "onnxruntime-cpu"
    assert caplog.records == []


@pytest.mark.parametrize("name", ["torch", "", "ONNXRuntime-CPU"])
def test_an_unknown_backend(bundle, name):
    with pytest.raises(BackendError, match=f"unknown backend '{name}': there are auto, .*{BACKENDS[0]}"):
        open_backend(bundle, backend=name)


def test_a_precision_that_cannot_be(bundle):
    with pytest.raises(
        BackendError, match="unknown precision 'fp8': there are fp32, fp16, fp16-attention, int8"
    ):
        open_backend(bundle, precision="fp8")
    with pytest.raises(
        BackendError, match=r"has no int8 graphs, .*`geoengine build-engines --precision int8`"
    ):
        open_backend(bundle, backend="onnxruntime-cpu", precision="int8")


@pytest.mark.parametrize("threads", [0, 100_000])
def test_a_number_of_threads_that_cannot_be(bundle, threads):
    with pytest.raises(BackendError, match=f"threads must be from 1 to 512, got {threads}"):
        open_backend(bundle, threads=threads)


def test_without_onnx_runtime(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        open_backend(bundle)


def test_threads_are_set(bundle, monkeypatch):
    seen = []
    import onnxruntime

    session = onnxruntime.InferenceSession

    def note(path, options, **arguments):
        seen.append((options.intra_op_num_threads, arguments["providers"]))
        return session(path, options, **arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", note)
    open_backend(bundle, threads=3).encode("photo", pictures(1))
    monkeypatch.setattr(module, "available_cores", lambda: 5)
    open_backend(bundle).encode("photo", pictures(1))
    assert seen == [(threads, [("CPUExecutionProvider", {})]) for threads in (3, 3, 5, 5)]


def test_a_graph_that_is_none(tmp_path):
    folder = write_tiny_bundle(tmp_path / "tiny")
    (folder / "onnx/head_z01.fp32.onnx").write_bytes(b"not a graph")
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
    opened = open_backend(EngineBundle.open(folder))
    opened.encode("z03", pictures(1))
    with pytest.raises(BackendError, match=r"ONNX Runtime .* cannot load .*head_z01\.fp32\.onnx: ") as caught:
        opened.encode("z01", pictures(1))
    assert "\n" not in str(caught.value)


def test_encoders_of_two_bundles_never_go_together(tmp_path):
    folder = write_tiny_bundle(tmp_path / "tiny")
    opened = open_backend(EngineBundle.open(folder))
    before = opened.encode("photo", pictures(2))
    folder.rename(tmp_path / "old")
    with pytest.raises(BundleError, match="is no engine bundle"):
        opened.encode("z01", pictures(1))
    write_tiny_bundle(folder)
    opened.encode("z01", pictures(1))  # the same bundle again does no harm
    shutil.copy(folder / "onnx/head_photo.fp32.onnx", folder / "onnx/head_z03.fp32.onnx")
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
    for _ in range(2):
        with pytest.raises(BundleError, match="has been replaced by another one while it was in use"):
            opened.encode("z03", pictures(1))
    np.testing.assert_array_equal(opened.encode("photo", pictures(2)), before)
    opened.close()


def test_a_graph_for_other_tokens(tmp_path):
    folder = write_tiny_bundle(tmp_path / "tiny")
    onnx.save(casting_model(), folder / "onnx/head_z01.fp32.onnx")
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot run .*head_z01\.fp32\.onnx: ") as caught:
        open_backend(EngineBundle.open(folder)).encode("z01", pictures(1))
    assert "\n" not in str(caught.value)


# --- ONNX Runtime itself ----------------------------------------------------------------------------------


def casting_model():
    """Transpose -> Cast from fp16 -> MatMul of dynamic shape, which crashes NchwcTransformer."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("Cast", ["t"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["c", "w"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "casting",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", "m", 16])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_the_optimiser_that_crashes_is_off_and_nothing_is_printed(tmp_path, bundle):
    onnx.save(casting_model(), tmp_path / "casting.onnx")
    program = (
        "import sys, pathlib, numpy as np\n"
        "from geoengine.engine.bundle import EngineBundle\n"
        "from geoengine.engine.backends import open_backend\n"
        "backend = open_backend(EngineBundle.open(sys.argv[1]))\n"
        "backend._sessions.get(pathlib.Path(sys.argv[2]))\n"
        "backend.encode('z01', np.zeros((2, 8, 8, 3), np.uint8))\n"
    )
    command = [sys.executable, "-c", program, str(bundle.path), str(tmp_path / "casting.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- cores ------------------------------------------------------------------------------------------------


def test_cgroup_quota(tmp_path):
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) == 2.5
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cgroup_quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path) is None


def test_cores_are_the_smaller_of_affinity_and_quota(monkeypatch):
    cores = "geoengine.engine.cores"
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    for quota, expected in ((None, 6), (0.5, 1), (2.5, 3), (64.0, 6)):
        monkeypatch.setattr(f"{cores}.cgroup_quota", lambda quota=quota: quota)
        assert available_cores() == expected
