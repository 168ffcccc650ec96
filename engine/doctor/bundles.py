"""Engine bundles, what executes them here, and what builds them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from geoengine.engine.backends import Backend, try_backends
from geoengine.engine.bundle import EngineBundle, usual_folders
from geoengine.engine.doctor.finding import REINSTALL, Finding, State, installed_version
from geoengine.engine.errors import BackendError, BundleError
from geoengine.engine.manifest import PHOTO, model_name

_EXPORT_PACKAGES = {
    "torch": "torch",
    "open_clip": "open_clip_torch",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "safetensors": "safetensors",
}


def findings() -> list[Finding]:
    """Open the bundles that there are, and run a picture through the encoders on every backend."""
    demo = _bundle("Demo bundle", "planet", REINSTALL)
    here, data = usual_folders()
    folders = [folder for folder in (here, data) if folder.is_dir()]
    earth = [_bundle(f"Bundle {folder}", folder, "") for folder in folders] or [_no_bundle(here, data)]
    sound = [folder for folder, finding in zip(folders, earth, strict=False) if finding.state is State.OK]
    tried = sound[0] if sound else "planet" if demo.state is State.OK else None
    backends = [] if tried is None else _backends(EngineBundle.open(tried, verify=False))
    return [_export_extra(), demo, *earth, *backends]


def _backends(bundle: EngineBundle) -> list[Finding]:
    """Try every backend on a bundle; the first that runs is what `--backend auto` takes."""
    found, chosen = [], False
    for name, opened in try_backends(bundle):
        topic = f"Backend {name}"
        problem = str(opened) if isinstance(opened, BackendError) else _problem(opened, bundle)
        if problem is not None or isinstance(opened, BackendError):
            found.append(Finding(topic=topic, state=State.ABSENT, detail=str(problem)))
            continue
        auto = "" if chosen else ": what `--backend auto` takes, the fastest that runs here"
        chosen = True
        detail = f"runs the {opened.variant} encoders of {bundle.manifest.model}{auto}"
        found.append(Finding(topic=topic, state=State.OK, detail=detail))
    return found


def _problem(backend: Backend, bundle: EngineBundle) -> str | None:
    """Return why a backend cannot encode a picture, or None when it can; closes it."""
    side = bundle.image_size
    try:
        backend.encode(PHOTO, np.zeros((1, side, side, 3), dtype=np.uint8))
    except (BackendError, BundleError) as error:
        return str(error)
    finally:
        backend.close()
    return None


def _export_extra() -> Finding:
    there = {
        p: installed_version(p) for module, p in _EXPORT_PACKAGES.items() if importlib.util.find_spec(module)
    }
    lacking = [package for package in _EXPORT_PACKAGES.values() if package not in there]
    if lacking:
        return Finding(
            topic="Export extra",
            state=State.ABSENT,
            detail=f"{', '.join(lacking)} not installed; only building engines needs the extra",
            remedy="pip install 'geoengine[export]'",
        )
    versions = ", ".join(f"{package} {number or '(unknown version)'}" for package, number in there.items())
    return Finding(topic="Export extra", state=State.OK, detail=versions)


def _no_bundle(here: Path, data: Path) -> Finding:
    return Finding(
        topic="Earth bundle",
        state=State.ABSENT,
        detail=f"none in ./{here} nor in {data}; needed for photos of Earth",
        remedy=f"geoengine build-engines --out {here}/",
    )


def _bundle(topic: str, path: str | Path, remedy: str) -> Finding:
    try:
        bundle = EngineBundle.open(path)
        geoclip = bundle.geoclip()
    except BundleError as error:
        fix = remedy or f"geoengine build-engines --out {path}"
        return Finding(topic=topic, state=State.BROKEN, detail=str(error), remedy=fix)
    zooms = f"levels {', '.join(map(str, bundle.levels))}" if bundle.levels else "no map encoders"
    inside = "" if geoclip is None or geoclip is bundle else f"; with {model_name(geoclip.manifest)}"
    detail = (
        f"{model_name(bundle.manifest)}, world {bundle.world}, {zooms}, "
        f"{', '.join(bundle.variants)}{inside}; checksums agree"
    )
    return Finding(topic=topic, state=State.OK, detail=detail)
