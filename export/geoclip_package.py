"""The files of the published GeoCLIP package: read where it is installed, and none of its code is run.

Its code is left alone because it brings a second deep-learning library, downloads weights when it is made,
and encodes its whole gallery again for every photo.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoengine.engine.errors import ExportError, MissingExtraError
from geoengine.export.weights import read_state

PACKAGE = "geoclip"

_LOCATION = "model/weights/location_encoder_weights.pth"
_PERCEPTRON = "model/weights/image_encoder_mlp_weights.pth"
_LOGIT_SCALE = "model/weights/logit_scale_weights.pth"
_GALLERY = "model/gps_gallery/coordinates_100K.csv"

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Capsule:
    """One of the location encoder's three: `frequencies`[f, 2], and dense layers of weight and bias.

    ReLU follows all layers but the last.
    """

    frequencies: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GeoClipPackage:
    """What GeoCLIP is made of, besides CLIP.

    `perceptron` are the dense layers after CLIP's image projection, weight and bias, with ReLU between.
    `gallery` has the distinct points that a photo is compared with, float64[n, 2], longitude and latitude in
    degrees, in the order of the package's file. `digest` is the SHA-256 of the files read.
    """

    version: str
    capsules: tuple[Capsule, ...]
    perceptron: tuple[tuple[Tensor, Tensor], ...]
    logit_scale: float
    gallery: NDArray[np.float64]
    digest: str

    @property
    def embed_dim(self) -> int:
        """The length of an embedding."""
        return len(self.perceptron[-1][1])

    @property
    def feature_dim(self) -> int:
        """The length of the CLIP embedding that the perceptron takes."""
        return int(self.perceptron[0][0].shape[1])


def read_package(folder: Path | None = None) -> GeoClipPackage:
    """Read the installed package, or the package folder given.

    Weights are read without running code from them. Raises MissingExtraError when the package is not
    installed, ExportError when a file of it is missing, damaged or of an unknown form.
    """
    version = "unknown"
    if folder is None:
        folder, version = _installed()
    capsules = _capsules(read_state(folder / _LOCATION), folder / _LOCATION)
    perceptron = _perceptron(read_state(folder / _PERCEPTRON), folder / _PERCEPTRON)
    if {len(capsule.layers[-1][1]) for capsule in capsules} != {len(perceptron[-1][1])}:
        raise ExportError(f"{folder}: its location encoder and its image encoder give different lengths")
    files = (_LOCATION, _PERCEPTRON, _LOGIT_SCALE, _GALLERY)
    return GeoClipPackage(
        version=version,
        capsules=capsules,
        perceptron=perceptron,
        logit_scale=_logit_scale(folder / _LOGIT_SCALE),
        gallery=_gallery(folder / _GALLERY),
        digest=hashlib.sha256(b"".join((folder / file).read_bytes() for file in files)).hexdigest(),
    )


def _installed() -> tuple[Path, str]:
    try:
        found = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise MissingExtraError(
            "adding GeoCLIP needs the weights in the package geoclip, which is not installed: "
            "run `pip install 'geoengine[geoclip]'`"
        ) from None
    return Path(str(found.locate_file(PACKAGE))), found.version


def _capsules(state: State, file: Path) -> tuple[Capsule, ...]:
    """Return the capsules in order; ExportError when names or shapes are not those of a location encoder."""
    rest = dict(state)
    capsules: list[Capsule] = []
    while f"LocEnc{len(capsules)}.capsule.0.b" in rest:
        start = f"LocEnc{len(capsules)}."
        frequencies = rest.pop(f"{start}capsule.0.b").float()
        names = (f"{start}capsule.1", f"{start}capsule.3", f"{start}capsule.5", f"{start}head.0")
        layers = tuple(_layer(rest, name, file) for name in names)
        if frequencies.ndim != 2 or frequencies.shape[1] != 2:
            raise ExportError(f"{file}: the frequencies have shape {tuple(frequencies.shape)}, not (n, 2)")
        _check_chain(layers, 2 * len(frequencies), file)
        capsules.append(Capsule(frequencies, layers))
    if not capsules or rest:
        what = f"has tensors that are not known here, such as {min(rest)}" if rest else "has no capsule"
        raise ExportError(f"{file}: the location encoder {what}: this version reads geoclip 1.2 and 1.3")
    return tuple(capsules)


def _perceptron(state: State, file: Path) -> tuple[tuple[Tensor, Tensor], ...]:
    rest = dict(state)
    layers = tuple(_layer(rest, name, file) for name in ("0", "2"))
    _check_chain(layers, int(layers[0][0].shape[1]), file)
    if rest:
        raise ExportError(f"{file}: it has tensors that are not known here, such as {min(rest)}")
    return layers


def _layer(rest: dict[str, Tensor], name: str, file: Path) -> tuple[Tensor, Tensor]:
    """Take a dense layer's weight and bias out of `rest`, as float32."""
    try:
        return rest.pop(f"{name}.weight").float(), rest.pop(f"{name}.bias").float()
    except KeyError as missing:
        raise ExportError(f"{file} lacks the tensor {missing}") from None


def _check_chain(layers: tuple[tuple[Tensor, Tensor], ...], inputs: int, file: Path) -> None:
    """Raise ExportError unless each layer takes what the one before gives, and all numbers are finite."""
    for weight, bias in layers:
        if weight.ndim != 2 or weight.shape != (len(bias), inputs):
            raise ExportError(
                f"{file}: a dense layer has shape {tuple(weight.shape)}, expected inputs {inputs}"
            )
        if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise ExportError(f"{file}: it holds numbers that are not finite")
        inputs = len(bias)


def _logit_scale(file: Path) -> float:
    """Return the factor on cosines; the file holds its logarithm, a tensor by itself."""
    if not file.is_file():
        raise ExportError(f"weights file {file} does not exist")
    try:
        scale = float(torch.load(file, map_location="cpu", weights_only=True).exp())
    except Exception as error:  # pickle, zip, type and value errors: whatever the file holds, it is no scalar
        raise ExportError(f"{file} does not hold a single number: {error}") from error
    if not 0 < scale < 1e4:
        raise ExportError(f"{file}: the logit scale must be above 0 and below 10000, got {scale}")
    return scale


def _gallery(file: Path) -> NDArray[np.float64]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = csv.DictReader(stream)
            points = dict.fromkeys((float(row["LON"]), float(row["LAT"])) for row in rows)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"the gallery {file} cannot be read: {error!r}") from error
    gallery = np.array(list(points), dtype=np.float64).reshape(-1, 2)
    if not len(gallery) or not (np.abs(gallery) <= (180, 90)).all():
        raise ExportError(f"the gallery {file} must hold longitudes to 180 and latitudes to 90 degrees")
    return gallery
