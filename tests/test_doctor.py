import io
import json
import sys

import pytest
from tiny_bundle import write_tiny_bundle
from typer.testing import CliRunner

from geoengine.cli import app
from geoengine.engine.doctor import bundles, examine, findings_table, gpu, onnx_runtime
from geoengine.engine.doctor.finding import REINSTALL, State
from geoengine.engine.errors import BackendError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder and a data folder without bundles, and a planet bundle of the tests' own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    planet = write_tiny_bundle(tmp_path / "planet")
    monkeypatch.setattr("geoengine.engine.bundle.PLANET", planet)
    return tmp_path


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "cuda_devices", lambda: [])


def found(topic):
    [finding] = [finding for finding in examine() if finding.topic == topic]
    return finding


def test_what_every_machine_has_is_found():
    states = {finding.topic: finding.state for finding in examine()}
    for topic in ("Python", "geoengine", "CPU", "Kernel", "Photos", "ONNX Runtime", "Demo bundle"):
        assert states[topic] is State.OK, topic
    assert "a session runs" in found("ONNX Runtime").detail


def test_everything_missing_names_the_command_that_mends_it(no_gpu):
    for finding in examine():
        harmless = finding.topic in ("GPU", "ORT CUDA", "Memory") or finding.topic.startswith("Backend")
        assert finding.state is State.OK or finding.remedy or harmless, finding.topic


def test_a_missing_earth_bundle_is_not_a_defect():
    finding = found("Earth bundle")
    assert (finding.state, finding.remedy) == (State.ABSENT, "geoengine build-engines --out engines/")


def test_bundles_here_and_in_the_data_folder_are_verified(elsewhere):
    here = write_tiny_bundle(elsewhere / "here" / "engines", world="earth")
    write_tiny_bundle(elsewhere / "data" / "geoengine" / "engines", world="earth")
    topics = {finding.topic: finding for finding in examine()}
    assert "Earth bundle" not in topics
    assert topics["Bundle engines"].state is State.OK
    assert "world earth, levels 1, 3, fp32; checksums agree" in topics["Bundle engines"].detail
    [data] = [topics[topic] for topic in topics if topic.endswith("data/geoengine/engines")]
    assert data.state is State.OK

    weights = next(here.rglob("*.onnx"))
    weights.write_bytes(bytes(weights.stat().st_size))
    broken = found("Bundle engines")
    assert (broken.state, broken.remedy) == (State.BROKEN, "geoengine build-engines --out engines")
    assert "SHA-256" in broken.detail


def test_a_missing_demo_bundle_is_a_defect(elsewhere, monkeypatch):
    monkeypatch.setattr("geoengine.engine.bundle.PLANET", elsewhere / "nothing")
    finding = found("Demo bundle")
    assert (finding.state, finding.remedy) == (State.BROKEN, REINSTALL)


def test_a_missing_extra_names_what_installs_it(monkeypatch):
    real = bundles.importlib.util.find_spec
    monkeypatch.setattr(
        bundles.importlib.util, "find_spec", lambda name: None if name == "torch" else real(name)
    )
    finding = found("Export extra")
    assert (finding.state, finding.remedy) == (State.ABSENT, "pip install 'geoengine[export]'")
    assert finding.detail.startswith("torch not installed")


def test_two_wheels_of_onnxruntime_are_a_defect(monkeypatch):
    monkeypatch.setattr(onnx_runtime, "installed_version", lambda package: "1.0")
    finding = found("ONNX Runtime")
    assert finding.state is State.BROKEN and "overwrite each other" in finding.detail
    assert finding.remedy.endswith("&& pip install onnxruntime-gpu")


def test_a_provider_that_does_not_load_is_told_without_noise(capfd):
    import onnxruntime

    problem = onnx_runtime._provider_problem(onnxruntime, "NoSuchExecutionProvider")
    assert problem is not None
    assert capfd.readouterr() == ("", "")


def test_a_gpu_that_onnxruntime_cannot_use_names_the_extra(monkeypatch):
    import onnxruntime

    monkeypatch.setattr(gpu, "cuda_devices", lambda: ["Some GPU, 80 GiB, compute capability 9.0"])
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnx_runtime, "_provider_problem", lambda ort, name: "no cuDNN" if name.startswith("CUDA") else None
    )
    assert found("GPU").state is State.OK and "Some GPU" in found("GPU").detail
    assert (found("ORT CUDA").state, found("ORT CUDA").remedy) == (
        State.ABSENT,
        "pip install 'geoengine[gpu]'",
    )


def test_a_machine_without_driver_has_no_gpu(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu.ctypes, "CDLL", missing)
    assert found("GPU").state is State.ABSENT


def test_the_table_shows_each_finding_and_its_remedy():
    table = findings_table(examine(), io.StringIO())
    assert "Earth bundle" in table and "→ geoengine build-engines --out engines/" in table
    assert "\x1b" not in table


def test_the_command_prints_a_table_or_json_and_succeeds():
    table, as_json = CliRunner().invoke(app, ["doctor"]), CliRunner().invoke(app, ["doctor", "--json"])
    assert (table.exit_code, as_json.exit_code) == (0, 0)
    assert "ONNX Runtime" in table.stdout
    [python, *_] = json.loads(as_json.stdout)["findings"]
    assert (python["topic"], python["state"], python["remedy"]) == ("Python", "ok", "")


def test_each_backend_is_tried_and_the_one_that_auto_takes_is_named():
    topics = {finding.topic: finding for finding in examine()}
    cpu = topics["Backend onnxruntime-cpu"]
    assert cpu.state is State.OK
    assert cpu.detail.startswith("runs the fp32 encoders of tiny: what `--backend auto` takes")


def test_a_backend_that_cannot_encode_is_not_taken(monkeypatch):
    def broken(self, encoder, pixels):
        raise BackendError("no memory left")

    monkeypatch.setattr("geoengine.engine.backends.onnxruntime.OnnxRuntimeCpu.encode", broken)
    finding = found("Backend onnxruntime-cpu")
    assert (finding.state, finding.detail) == (State.ABSENT, "no memory left")


def test_a_gpu_without_its_libraries_names_the_extras(monkeypatch):
    monkeypatch.setattr(gpu, "cuda_devices", lambda: ["Some GPU, 80 GiB, compute capability 9.0"])
    for module in ("tensorrt", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(gpu, "_CUDNN", "libcudnn-of-nobody.so.9")
    for topic, extra in (("CUDA", "gpu"), ("cuDNN", "gpu"), ("TensorRT", "tensorrt")):
        finding = found(topic)
        assert (finding.state, finding.remedy) == (State.ABSENT, f"pip install 'geoengine[{extra}]'")
