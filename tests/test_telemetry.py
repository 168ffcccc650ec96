"""What geoengine runs must report to nobody: ONNX Runtime's wheels would, unless told not to."""

import os
import subprocess
import sys

import pytest

LOAD = "from geoengine.engine.backends.sessions import load_onnxruntime\nort = load_onnxruntime()\n"
RUN = """
import numpy as np
from geoengine.engine.doctor.onnx_runtime import _IDENTITY_MODEL
session = ort.InferenceSession(_IDENTITY_MODEL, providers=["CPUExecutionProvider"])
session.run(None, {"x": np.zeros(1, np.float32)})
"""


def files_left(home, code):
    """What a process leaves in the user's folders, whose environment is that of a plain user."""
    home.mkdir()
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.skipif(sys.platform != "linux", reason="where the traces of it lie is known for Linux")
def test_onnx_runtime_keeps_no_device_id_and_queues_no_reports(tmp_path):
    assert files_left(tmp_path / "ours", LOAD + RUN) == []
    if not files_left(tmp_path / "theirs", "import onnxruntime as ort\n" + RUN):
        pytest.skip("this ONNX Runtime reports nothing by itself")


def test_the_user_has_the_last_word(monkeypatch):
    from geoengine.engine.backends.sessions import load_onnxruntime

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    load_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    load_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
