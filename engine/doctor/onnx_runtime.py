"""ONNX Runtime and its execution providers, which are tried, not listed."""

from __future__ import annotations

import warnings
from typing import Any

from geoengine.engine.backends.sessions import load_onnxruntime
from geoengine.engine.doctor import gpu
from geoengine.engine.doctor.finding import Finding, State, installed_version

_ORT_WHEELS = ("onnxruntime-gpu", "onnxruntime")

# An ONNX model that copies float32[1], so that a session can be opened without the onnx package.
_IDENTITY_MODEL = (
    b'\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n'
    b"\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


def findings() -> list[Finding]:
    """Run a session on the CPU, and one on the GPU where the wheel is for GPUs."""
    wheels = [wheel for wheel in _ORT_WHEELS if installed_version(wheel)]
    remedy = f"pip uninstall -y {' '.join(_ORT_WHEELS)} && pip install {(*wheels, *_ORT_WHEELS)[0]}"
    if len(wheels) > 1:
        detail = f"{' and '.join(wheels)} are both installed, and overwrite each other's files"
        return [Finding(topic="ONNX Runtime", state=State.BROKEN, detail=detail, remedy=remedy)]
    try:
        onnxruntime = load_onnxruntime()
    except Exception as error:  # a broken wheel fails in many ways
        detail = f"cannot be imported: {error}"
        return [Finding(topic="ONNX Runtime", state=State.BROKEN, detail=detail, remedy=remedy)]
    problem = _provider_problem(onnxruntime, "CPUExecutionProvider")
    detail = f"{onnxruntime.__version__}, on the CPU: {problem or 'a session runs'}"
    if problem is not None:
        return [Finding(topic="ONNX Runtime", state=State.BROKEN, detail=detail, remedy=remedy)]
    cpu = Finding(topic="ONNX Runtime", state=State.OK, detail=detail)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return [cpu]
    problem = _provider_problem(onnxruntime, "CUDAExecutionProvider")
    if problem is None:
        return [cpu, Finding(topic="ORT CUDA", state=State.OK, detail="a session runs on the GPU")]
    # Without a GPU that is as it should be, and the finding about the GPU says so.
    remedy = "pip install 'geoengine[gpu]'" if gpu.cuda_devices() else ""
    return [cpu, Finding(topic="ORT CUDA", state=State.ABSENT, detail=problem, remedy=remedy)]


def _provider_problem(onnxruntime: Any, provider: str) -> str | None:  # noqa: ANN401 - the module
    """Return why a session does not run with the provider, or None when it does."""
    import numpy as np

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the native library would write its own lines to stderr
    options.intra_op_num_threads = 1
    onnxruntime.set_default_logger_severity(4)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # With its fall-back to the CPU, onnxruntime prints what fails to stdout.
            session = onnxruntime.InferenceSession(
                _IDENTITY_MODEL, options, providers=[provider], enable_fallback=0
            )
        [copied] = session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # onnxruntime has its own exception for each failure
        return str(error).strip().splitlines()[0]
    finally:
        onnxruntime.set_default_logger_severity(2)
    if provider not in session.get_providers():
        return f"the wheel has {provider}, but it cannot be loaded here"
    return None if copied[0] == 1 else "a session gives wrong numbers"
