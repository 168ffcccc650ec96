"""Adding GeoCLIP to an engine bundle: photo encoder, location encoder, and the gallery's embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from geoengine.engine.backends.sessions import load_onnxruntime
from geoengine.engine.bundle import GEOCLIP, EngineBundle
from geoengine.engine.errors import ExportError
from geoengine.engine.geoclip.gallery import order_ids
from geoengine.engine.geoclip.locations import LocationEncoder
from geoengine.engine.manifest import MANIFEST, PHOTO, GeoClipFiles
from geoengine.engine.sources import fingerprint
from geoengine.export.build import build_bundle
from geoengine.export.check import Progress, Steps
from geoengine.export.checkpoints import RANDOM, load_clip_encoders
from geoengine.export.config import BuildConfig
from geoengine.export.encoders import EncoderSet
from geoengine.export.geoclip_check import REFERENCE, check_geoclip, check_points
from geoengine.export.geoclip_graph import reference_locations, write_location_encoder
from geoengine.export.geoclip_package import GeoClipPackage, read_package
from geoengine.export.report import BuildReport
from geoengine.export.staging import Staging, check_target
from geoengine.export.towers import TowerAndPerceptron
from geoengine.export.work import Work

CLIP_MODEL = "ViT-L-14-quickgelu"
"""The image encoder that GeoCLIP was trained on, as open_clip names it."""

CLIP_WEIGHTS = "openai"
"""And its weights; with others the image head means nothing."""

_LOCATION, _POINTS, _EMBEDDINGS = "onnx/location.fp32.onnx", "gallery.points.npy", "gallery.embeddings.npy"
_CHUNK = 4096  # points between two steps of the progress bar


def build_geoclip(
    config: BuildConfig, clip: str = CLIP_WEIGHTS, progress: Progress | None = None
) -> BuildReport:
    """Build GeoCLIP's bundle in the folder of the bundle `config.out`, whether there is one or not.

    The weights of location encoder and image head, and the gallery's points, are those of the installed
    package. `clip` is the weights of CLIP's ViT-L/14: "openai", a file, or "none" for random ones. Of
    `config`, precisions, backend, largest batch and calibration count. Raises as `build_engines` does, and
    MissingExtraError without the package.
    """
    check_target(config.out.absolute())
    if (config.out / MANIFEST).is_file() and EngineBundle.open(config.out, verify=False).world != "earth":
        raise ExportError(f"GeoCLIP knows Earth, and the engine bundle {config.out} is of another world")
    steps = Steps(progress)
    steps("read the GeoCLIP package")
    package = read_package()
    steps("load CLIP's image encoder")
    encoders = geoclip_encoders(package, clip)
    config = dataclasses.replace(config, input_sizes=(encoders.image_size,), levels=None)
    work = GeoClipWork(config, encoders, package, steps)
    return build_bundle(config, config.out.absolute() / GEOCLIP, work, steps, progress)


def geoclip_encoders(package: GeoClipPackage, clip: str) -> EncoderSet:
    """Return GeoCLIP's photo encoder: CLIP's image encoder, and the package's perceptron on top."""
    if clip not in (CLIP_WEIGHTS, RANDOM) and not Path(clip).is_file():
        raise ExportError(
            f"--geoclip-clip takes {CLIP_WEIGHTS} (the weights that GeoCLIP was trained on), a file of them, "
            f"or {RANDOM}, and {clip!r} is none of these"
        )
    try:
        loaded = load_clip_encoders(model=CLIP_MODEL, pretrained=clip, levels=())
    except ExportError as error:
        raise ExportError(str(error).replace("--pretrained", "--geoclip-clip")) from error
    if loaded.embed_dim != package.feature_dim:
        raise ExportError(
            f"{CLIP_MODEL} gives {loaded.embed_dim} numbers, and GeoCLIP's image head takes "
            f"{package.feature_dim}"
        )
    tower = TowerAndPerceptron(loaded.towers[PHOTO], _perceptron(package.perceptron))
    return dataclasses.replace(
        loaded,
        model=f"GeoCLIP {package.version} on {loaded.model}",
        towers={PHOTO: tower.eval().requires_grad_(False)},
    )


def _perceptron(layers: Sequence[tuple[Tensor, Tensor]]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for weight, bias in layers:
        dense = nn.Linear(weight.shape[1], weight.shape[0])
        dense.load_state_dict({"weight": weight, "bias": bias})
        modules += [dense, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class GeoClipWork(Work):
    """A build of GeoCLIP: besides the photo encoder, the location encoder and the gallery."""

    def __init__(
        self, config: BuildConfig, encoders: EncoderSet, package: GeoClipPackage, steps: Steps
    ) -> None:
        super().__init__(config, encoders, steps)
        self._package = package
        self.weights = fingerprint(self.weights, package.digest)

    @property
    def extra_bytes(self) -> int:
        """What the bundle takes on the disk besides its photo encoder's weights."""
        package = self._package
        numbers = sum(weight.numel() for capsule in package.capsules for weight, _ in capsule.layers)
        return super().extra_bytes + 2 * numbers + len(package.gallery) * (16 + 2 * package.embed_dim)

    def extras(self, staging: Staging) -> dict[str, Any]:
        """Write location encoder, gallery and the numbers to check them by; returns the manifest's entry."""
        folder, package = staging.path, self._package
        points = package.gallery[np.argsort(order_ids(package.gallery), kind="stable")]
        files = GeoClipFiles(
            location=_LOCATION,
            points=_POINTS,
            embeddings=_EMBEDDINGS,
            logit_scale=package.logit_scale,
            package=package.version,
        )

        def location() -> None:
            self._steps("export the location encoder")
            write_location_encoder(package, folder / _LOCATION)
            checked = check_points()
            np.save(
                folder / REFERENCE, np.concatenate([checked, reference_locations(package, checked)], axis=1)
            )

        staging.noted("location", location)
        staging.noted("gallery", lambda: self._write_gallery(folder, points, files))
        return {"geoclip": dataclasses.asdict(files)}

    def check_extras(self, bundle: EngineBundle) -> dict[str, Any]:
        """Hold the location encoder and the gallery to their gates; returns the manifest's figures."""
        self._steps("check the location encoder and the gallery")
        return check_geoclip(bundle)

    def _write_gallery(self, folder: Path, points: NDArray[np.float64], files: GeoClipFiles) -> None:
        """Write the gallery's points and embeddings; the encoder that computes them is the bundle's own."""
        np.save(folder / files.points, points)
        embeddings = np.empty((len(points), self._package.embed_dim), dtype=np.float16)
        session = load_onnxruntime().InferenceSession(
            folder / files.location, providers=["CPUExecutionProvider"]
        )
        encoder = LocationEncoder(
            lambda batch: session.run(["embedding"], {"points": batch})[0], self._package.embed_dim
        )
        for start in range(0, len(points), _CHUNK):
            self._steps(f"embed the gallery, {start} of {len(points)} points")
            embeddings[start : start + _CHUNK] = encoder.embed(points[start : start + _CHUNK])
        np.save(folder / files.embeddings, embeddings)
