"""What a build does between loading its encoders and putting the bundle in place."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoengine.engine.backends import BACKENDS, ONNXRUNTIME_CUDA, TENSORRT
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.manifest import MANIFEST, SCHEMA, Variant, encoder_name
from geoengine.export.check import Steps, check_backends, pairs_of
from geoengine.export.config import EARTH_SIDES, PRECISIONS, BuildConfig
from geoengine.export.report import parity_table
from geoengine.export.staging import Staging

if TYPE_CHECKING:
    from geoengine.export.encoders import EncoderSet
    from geoengine.export.parity import Measurement

_SPARE_BYTES = 10_000_000  # resize matrices, graphs, reference, manifest
_FLOAT = "float"  # where fp32 graphs wait to be quantized, if the bundle is not to have them


class Work:
    """One build: what is made of which encoders."""

    def __init__(self, config: BuildConfig, encoders: EncoderSet, steps: Steps) -> None:
        self._config, self.encoders, self._steps = config, encoders, steps
        self.precisions = config.precisions_for(encoders.world)
        self.variants = [variant for name in self.precisions for variant in PRECISIONS[name]]
        self._sides = _sides(config, encoders)
        self.weights = _weights_digest(encoders)
        self.figures: dict[str, Any] = {}

    @property
    def extra_bytes(self) -> int:
        """What the bundle takes on the disk besides its encoders' weights."""
        return _SPARE_BYTES

    def extras(self, staging: Staging) -> dict[str, Any]:
        """Write what the bundle has besides its encoders; returns further entries of the manifest."""
        return {}

    def check_extras(self, bundle: EngineBundle) -> dict[str, Any]:
        """Hold what `extras` wrote to its gates; returns figures for the manifest and the report."""
        return {}

    def key(self) -> str:
        """Return what an interrupted build must have in common with this one to be taken up again."""
        pictures = sorted(self._config.calibration.rglob("*")) if self._config.calibration else []
        return json.dumps(
            {
                "weights": self.weights,
                "levels": self.encoders.levels,
                "variants": self.variants,
                "sides": self._sides,
                "calibration": [(str(file), file.stat().st_size) for file in pictures],
                "tools": _tools(),
                "geoengine": importlib.metadata.version("geoengine"),
            }
        )

    def run(self, staging: Staging) -> tuple[list[Measurement], dict[str, str]]:
        """Fill the staging folder with a whole bundle; returns the figures, and why backends cannot run."""
        from geoengine.export.reference import REFERENCE, load_reference, make_reference, save_reference

        folder = staging.path
        (folder / "onnx").mkdir(exist_ok=True)
        graphs = {variant: self._graphs(staging, variant) for variant in self.variants}
        shutil.rmtree(folder / _FLOAT, ignore_errors=True)
        entries = self.extras(staging)
        manifest = self._manifest(folder, graphs) | entries
        _write_manifest(folder, manifest)
        bundle = EngineBundle.open(folder, verify=False)
        pairs = pairs_of(bundle)
        self._steps.total = self._steps.done + len(pairs) * (1 + len(self.variants)) + 1

        def write_reference() -> None:
            save_reference(make_reference(self.encoders, pairs, self._steps), folder / REFERENCE)

        staging.noted("reference", write_reference)
        results, skipped = check_backends(
            bundle,
            load_reference(folder / REFERENCE),
            self._steps,
            backends=tuple(name for name in BACKENDS if name != TENSORRT),
            required=None if self._config.backend in ("auto", TENSORRT) else self._config.backend,
            noted=staging.noted,
        )
        manifest["files"][REFERENCE] = file_entry(folder / REFERENCE)
        self.figures = self.check_extras(bundle)
        manifest["parity"] = parity_table(results) | self.figures
        manifest["preferred"] = _preferred(results)
        _write_manifest(folder, manifest)
        return results, skipped

    def _graphs(self, staging: Staging, variant: Variant) -> dict[str, dict[str, str]]:
        """Write the graphs of one variant, unless they are there; returns the manifest's entry for them."""
        folder = staging.path / "onnx"
        if variant is not Variant.int8:
            return self._float_graphs(staging, folder, variant)
        source = folder
        if Variant.fp32 not in self.variants:
            source = staging.path / _FLOAT
            source.mkdir(exist_ok=True)

        def quantize() -> dict[str, dict[str, str]]:
            from geoengine.export.calibration import calibration_pictures
            from geoengine.export.int8 import quantize_graphs

            _remove(folder.glob(f"*.{variant}.onnx"))
            floats = self._float_graphs(staging, source, Variant.fp32)
            self._steps("calibrate and quantize to int8")
            trunks, heads = quantize_graphs(
                {int(side): staging.path / path for side, path in floats["trunks"].items()},
                {name: staging.path / path for name, path in floats["heads"].items()},
                folder,
                calibration_pictures(self._config.calibration, self.encoders.image_size),
            )
            return _graph_paths(staging.path, trunks, heads)

        found: dict[str, dict[str, str]] = staging.noted("int8", quantize)
        return found

    def _float_graphs(self, staging: Staging, folder: Path, variant: Variant) -> dict[str, dict[str, str]]:
        from geoengine.export.onnx_graphs import write_heads, write_trunks

        encoders = self.encoders

        def trunks() -> dict[str, str]:
            self._steps(f"export the trunk, {variant}")
            _remove(folder.glob(f"trunk.*.{variant}.onnx"))
            made = {side: encoders.trunk(side) for side in self._sides}
            files = write_trunks(made, folder, variant=variant)
            return _graph_paths(staging.path, files, {})["trunks"]

        def heads() -> dict[str, str]:
            self._steps(f"export the heads, {variant}")
            _remove(folder.glob(f"head_*.{variant}.onnx"))
            made = ((name, encoders.head(name)) for name in encoders.towers)
            files = write_heads(made, folder, variant=variant)
            return _graph_paths(staging.path, {}, files)["heads"]

        return {
            "trunks": staging.noted(f"trunks {variant}", trunks),
            "heads": staging.noted(f"heads {variant}", heads),
        }

    def _manifest(self, folder: Path, graphs: Mapping[Variant, Any]) -> dict[str, Any]:
        """Return the manifest, without parity figures yet."""
        encoders = self.encoders
        return {
            "schema": SCHEMA,
            "geoengine": importlib.metadata.version("geoengine"),
            "model": encoders.model,
            "pretrained": encoders.pretrained,
            "world": encoders.world,
            "levels": list(encoders.levels),
            "embed_dim": encoders.embed_dim,
            "image_size": encoders.image_size,
            "mean": list(encoders.mean),
            "std": list(encoders.std),
            "resize_mode": encoders.resize_mode,
            "logit_scale": {name: encoders.logit_scale[name] for name in map(encoder_name, encoders.levels)},
            "graphs": graphs,
            "preferred": {},
            "weights": self.weights,
            "files": {
                file.relative_to(folder).as_posix(): file_entry(file)
                for file in sorted([*(folder / "onnx").iterdir(), *folder.glob("*.npy")])
            },
            "tools": _tools(),
            "parity": {},
        }


def _remove(files: Iterable[Path]) -> None:
    """Remove what an interrupted build may have left half written."""
    for file in files:
        file.unlink()


def _graph_paths(
    root: Path, trunks: Mapping[int, Path], heads: Mapping[str, Path]
) -> dict[str, dict[str, str]]:
    return {
        "trunks": {str(side): file.relative_to(root).as_posix() for side, file in trunks.items()},
        "heads": {name: file.relative_to(root).as_posix() for name, file in heads.items()},
    }


def _preferred(results: Sequence[Measurement]) -> dict[str, str]:
    """Return which variant ONNX Runtime ran fastest on the GPU, by the backend's name; {} without one."""
    seconds: dict[str, float] = {}
    for result in results:
        if result.backend == ONNXRUNTIME_CUDA:
            seconds[result.variant] = seconds.get(result.variant, 0.0) + 1 / result.images_per_second
    return {ONNXRUNTIME_CUDA: min(seconds, key=seconds.__getitem__)} if seconds else {}


def _weights_digest(encoders: EncoderSet) -> str:
    """Return the SHA-256 of all encoders' weights; tensors that several share are read once."""
    digests: dict[int, str] = {}
    whole = hashlib.sha256()
    for encoder, tower in encoders.towers.items():
        for name, tensor in tower.state_dict().items():
            if tensor.data_ptr() not in digests:
                values = tensor.detach().float().contiguous().numpy()
                digests[tensor.data_ptr()] = hashlib.sha256(values.data).hexdigest()
            whole.update(f"{encoder} {name} {tuple(tensor.shape)} {digests[tensor.data_ptr()]}\n".encode())
    return whole.hexdigest()


def _tools() -> dict[str, str]:
    modules = ("torch", "open_clip", "onnx", "onnx_ir", "onnxruntime")
    return {name: str(import_module(name).__version__) for name in modules}


def _sides(config: BuildConfig, encoders: EncoderSet) -> tuple[int, ...]:
    usual = EARTH_SIDES if encoders.world == "earth" else ()
    wanted = usual if config.input_sizes is None else config.input_sizes
    return tuple(sorted({encoders.image_size, *wanted}))


def file_entry(file: Path) -> dict[str, Any]:
    """Return what a manifest says of a file: its SHA-256 and its size."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "bytes": file.stat().st_size}


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
