"""The manifest of an engine bundle: what `manifest.json` says, checked field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any, TypeVar

from geoengine.engine.sources import fingerprint

SCHEMA = 2
"""The manifest schema that this version writes and reads."""

MANIFEST = "manifest.json"
PHOTO = "photo"
"""Name of the photo encoder; `encoder_name` names the map encoders."""

WORLDS = ("earth", "planet")
RESIZE_MODES = ("shortest", "squash")
"""How a photo becomes a square: its middle at the shorter side's scale, or the whole of it distorted."""

T = TypeVar("T")


class Variant(StrEnum):
    """One way to compute an encoder; the name is the precision of its matrix products.

    `fp16` spells attention out, which TensorRT fuses; `fp16_attention` has ONNX's Attention operator instead,
    and the same weight files. `int8` is for CPUs.
    """

    fp32 = "fp32"
    fp16 = "fp16"
    fp16_attention = "fp16-attention"
    int8 = "int8"


def encoder_name(zoom: int) -> str:
    """Return the name of the map encoder of a zoom: "z04" for 4."""
    return f"z{zoom:02d}"


def precision_of(variant: Variant) -> str:
    """Return the precision of a variant's matrix products, as `build-engines --precision` takes it."""
    return variant.split("-")[0]


@dataclass(frozen=True, slots=True)
class BundleFile:
    """Size and SHA-256 (lower-case hex) of one file of a bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Graphs:
    """The ONNX files of one variant: `trunks` by the side of their uint8 input, `heads` by encoder."""

    trunks: Mapping[int, str]
    heads: Mapping[str, str]

    def files(self) -> list[str]:
        """Return every graph: trunks, then heads."""
        return [*self.trunks.values(), *self.heads.values()]


@dataclass(frozen=True, kw_only=True, slots=True)
class GeoClipFiles:
    """What a bundle of GeoCLIP has besides the graphs of its photo encoder.

    `location` is the graph of the location encoder; `points` and `embeddings` are the gallery's, .npy files
    float64[n, 2] (longitude and latitude in degrees) and float16[n, d]. `logit_scale` is the factor on
    cosines in a softmax over the gallery, `package` the version of the package that all this comes from.
    """

    location: str
    points: str
    embeddings: str
    logit_scale: float
    package: str

    def files(self) -> tuple[str, str, str]:
        """Return all paths."""
        return self.location, self.points, self.embeddings


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` says; paths are relative to the bundle's folder and use "/".

    `image_size` is the side in pixels that the encoders work at, and `resize_mode` (one of `RESIZE_MODES`)
    how a photo is brought to it; `mean` and `std` are per RGB channel on a 0 to 1 scale and are already part
    of the graphs. `logit_scale` maps map encoder names to the factor on their cosines in a softmax. `graphs`
    has the variants, `preferred` the one that was faster when the bundle was built, by backend, where that
    was measured. `files` maps every path but the manifest's to its checksum. `weights` is the SHA-256 of the
    encoders' float32 weights. `tools` (versions) and
    `parity` (figures against PyTorch, per variant and encoder) are for people and are not interpreted.

    A bundle of GeoCLIP, which has no map encoders and no `levels`, says in `geoclip` what else it has.
    """

    schema: int
    geoengine: str
    model: str
    pretrained: str
    world: str
    levels: tuple[int, ...]
    embed_dim: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_mode: str
    logit_scale: Mapping[str, float]
    graphs: Mapping[Variant, Graphs]
    preferred: Mapping[str, Variant]
    weights: str
    files: Mapping[str, BundleFile]
    tools: Mapping[str, Any]
    parity: Mapping[str, Any]
    geoclip: GeoClipFiles | None = None

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Build a manifest from decoded JSON; raises ValueError saying which field is wrong."""
        fields = _Fields(data)
        schema = fields.integer("schema", at_least=1)
        written_by = fields.text("geoengine")
        if schema != SCHEMA:
            mend = "update geoengine" if schema > SCHEMA else "build the bundle again"
            raise ValueError(
                f"schema {schema} was written by geoengine {written_by}, and this version reads schema "
                f"{SCHEMA}: {mend}"
            )
        manifest = cls(
            schema=schema,
            geoengine=written_by,
            model=fields.text("model"),
            pretrained=fields.text("pretrained"),
            world=fields.text("world"),
            levels=tuple(_integer(z, "levels", at_least=0) for z in fields.array("levels")),
            embed_dim=fields.integer("embed_dim", at_least=1),
            image_size=fields.integer("image_size", at_least=1),
            mean=fields.rgb("mean"),
            std=fields.rgb("std"),
            resize_mode=fields.text("resize_mode"),
            logit_scale={k: _number(v, "logit_scale") for k, v in fields.mapping("logit_scale").items()},
            graphs={_variant(name): _graphs(entry) for name, entry in fields.mapping("graphs").items()},
            preferred={name: _variant(value) for name, value in fields.mapping("preferred").items()},
            weights=fields.text("weights"),
            files={_path(path, "files"): _file(entry) for path, entry in fields.mapping("files").items()},
            tools=fields.mapping("tools"),
            parity=fields.mapping("parity"),
            geoclip=_geoclip(fields.mapping("geoclip")) if fields.has("geoclip") else None,
        )
        manifest._check()
        return manifest

    def _check(self) -> None:
        for name, value, known in (
            ("world", self.world, WORLDS),
            ("resize_mode", self.resize_mode, RESIZE_MODES),
        ):
            if value not in known:
                raise ValueError(f'"{name}" must be one of {", ".join(known)}, got {value!r}')
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not rising or not (self.levels or self.geoclip):
            raise ValueError(f'"levels" must increase strictly, got {list(self.levels)}')
        for path in () if self.geoclip is None else self.geoclip.files():
            if path not in self.files:
                raise ValueError(f'"files" lacks {path}')
        if not self.graphs:
            raise ValueError('"graphs" is empty')
        for variant, graphs in self.graphs.items():
            self._check_graphs(variant, graphs)
        for name in map(encoder_name, self.levels):
            if name not in self.logit_scale:
                raise ValueError(f'"logit_scale" lacks the encoder {name}')

    def _check_graphs(self, variant: Variant, graphs: Graphs) -> None:
        for name in (PHOTO, *map(encoder_name, self.levels)):
            if name not in graphs.heads:
                raise ValueError(f'"heads" of {variant} lacks the encoder {name}')
        if self.image_size not in graphs.trunks:
            raise ValueError(f'"trunks" of {variant} lacks the image size, {self.image_size}')
        for path in graphs.files():
            if path not in self.files:
                raise ValueError(f'"files" lacks {path}')


def model_name(manifest: Manifest) -> str:
    """Return what people are told of the encoders; random ones are never to be taken for trained ones."""
    if manifest.pretrained == "none":
        return f"{manifest.model} with random weights, for timing only"
    return f"{manifest.model}/{manifest.pretrained}"


def encoder_hash(manifest: Manifest) -> str:
    """Return the SHA-256 of what a bundle's encoders compute, whatever computes it.

    That is the hash of their weights; of a bundle that does not say it, that of its graphs.
    """
    weights = manifest.weights or " ".join(sorted(file.sha256 for file in manifest.files.values()))
    return fingerprint(weights, f"{manifest.image_size} {manifest.mean} {manifest.std}")


class _Fields:
    """Typed access to a JSON object; every method raises ValueError naming the field."""

    def __init__(self, data: object) -> None:
        self._data = _typed(data, dict, "the manifest")

    def _get(self, name: str) -> object:
        if name not in self._data:
            raise ValueError(f'"{name}" is missing')
        return self._data[name]

    def has(self, name: str) -> bool:
        return name in self._data

    def number(self, name: str) -> float:
        return _number(self._get(name), name)

    def text(self, name: str) -> str:
        return _typed(self._get(name), str, f'"{name}"')

    def integer(self, name: str, *, at_least: int) -> int:
        return _integer(self._get(name), name, at_least=at_least)

    def array(self, name: str) -> list[Any]:
        return _typed(self._get(name), list, f'"{name}"')

    def mapping(self, name: str) -> dict[str, Any]:
        return _typed(self._get(name), dict, f'"{name}"')

    def rgb(self, name: str) -> tuple[float, float, float]:
        values = self.array(name)
        if len(values) != 3:
            raise ValueError(f'"{name}" must have 3 numbers, got {len(values)}')
        r, g, b = (_number(value, name) for value in values)
        return r, g, b


_JSON_NAMES = {dict: "an object", list: "an array", str: "a string", int: "an integer"}


def _typed(value: object, kind: type[T], what: str) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{what} must be {_JSON_NAMES[kind]}, got {value!r:.40}")
    return value


def _integer(value: object, name: str, *, at_least: int) -> int:
    number = _typed(value, int, f'"{name}"')
    if number < at_least:
        raise ValueError(f'"{name}" must be at least {at_least}, got {number}')
    return number


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'"{name}" must hold numbers, got {value!r:.40}')
    if not math.isfinite(value):
        raise ValueError(f'"{name}" must hold finite numbers, got {value}')
    return float(value)


def _variant(name: object) -> Variant:
    try:
        return Variant(_typed(name, str, "a variant"))
    except ValueError:
        raise ValueError(f"unknown variant {name!r:.40}: update geoengine") from None


def _graphs(value: object) -> Graphs:
    fields = _Fields(value)
    return Graphs(
        trunks={_side(side): _path(path, "trunks") for side, path in fields.mapping("trunks").items()},
        heads={name: _path(path, "heads") for name, path in fields.mapping("heads").items()},
    )


def _geoclip(value: object) -> GeoClipFiles:
    fields = _Fields(value)
    location, points, embeddings = (
        _path(fields.text(name), "geoclip") for name in ("location", "points", "embeddings")
    )
    return GeoClipFiles(
        location=location,
        points=points,
        embeddings=embeddings,
        logit_scale=fields.number("logit_scale"),
        package=fields.text("package"),
    )


def _side(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f'"trunks" must map sides in pixels to files, got {text!r:.40}')
    return int(text)


def _path(value: object, name: str) -> str:
    path = _typed(value, str, f'a path in "{name}"')
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise ValueError(f'"{name}" has a path that leaves the folder: {path!r}')
    return path


def _file(value: object) -> BundleFile:
    entry = _Fields(value)
    return BundleFile(bytes=entry.integer("bytes", at_least=0), sha256=entry.text("sha256").lower())
