"""Engine bundles: a folder with a manifest and every compiled encoder, checked before anything is loaded.

```
manifest.json                      what `Manifest` holds, as JSON, and the checksum of every other file
onnx/trunk.<side>.<precision>.onnx   uint8[n, side, side, 3] -> tokens; the layers that all encoders share
onnx/head_<encoder>.<precision>.onnx tokens -> unit embedding; `<encoder>` is "photo", "z04", "z06" ...
```
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from geoengine.engine.errors import BundleError

SCHEMA = 1
"""The manifest schema that this version writes, and the newest that it reads."""

MANIFEST = "manifest.json"
PHOTO = "photo"
"""Name of the photo encoder; `encoder_name` names the map encoders."""

WORLDS = ("earth", "planet")
PLANET = Path(__file__).parent / "data" / "planet"
"""The ready bundle of the built-in planet, which the package brings."""

_HASH_CHUNK = 1 << 20

T = TypeVar("T")


def encoder_name(zoom: int) -> str:
    """Return the name of the map encoder of a zoom: "z04" for 4."""
    return f"z{zoom:02d}"


@dataclass(frozen=True, slots=True)
class BundleFile:
    """Size and SHA-256 (lower-case hex) of one file of a bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` says; paths are relative to the bundle's folder and use "/".

    `image_size` is the side in pixels that the encoders work at; `mean` and `std` are per RGB channel on a 0
    to 1 scale and are already part of the graphs. `logit_scale` maps map encoder names to the factor on
    their cosines in a softmax. `trunks` maps the side of the uint8 input to a graph, `heads` encoder names to
    graphs, `files` every path but the manifest's to its checksum. `tools` (versions) and `parity` (figures
    against PyTorch, per encoder) are for people and are not interpreted.
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
    precision: str
    logit_scale: Mapping[str, float]
    trunks: Mapping[int, str]
    heads: Mapping[str, str]
    files: Mapping[str, BundleFile]
    tools: Mapping[str, Any]
    parity: Mapping[str, Any]

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Build a manifest from decoded JSON; raises ValueError saying which field is wrong."""
        fields = _Fields(data)
        schema = fields.integer("schema", at_least=1)
        written_by = fields.text("geoengine")
        if schema > SCHEMA:
            raise ValueError(
                f"schema {schema} was written by geoengine {written_by}, and this version reads up to schema "
                f"{SCHEMA}: update geoengine"
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
            precision=fields.text("precision"),
            logit_scale={k: _number(v, "logit_scale") for k, v in fields.mapping("logit_scale").items()},
            trunks={_side(side): _path(path, "trunks") for side, path in fields.mapping("trunks").items()},
            heads={name: _path(path, "heads") for name, path in fields.mapping("heads").items()},
            files={_path(path, "files"): _file(entry) for path, entry in fields.mapping("files").items()},
            tools=fields.mapping("tools"),
            parity=fields.mapping("parity"),
        )
        manifest._check()
        return manifest

    def _check(self) -> None:
        if self.world not in WORLDS:
            raise ValueError(f'"world" must be one of {", ".join(WORLDS)}, got {self.world!r}')
        if not self.levels or any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f'"levels" must increase strictly, got {list(self.levels)}')
        for name in (PHOTO, *map(encoder_name, self.levels)):
            if name not in self.heads:
                raise ValueError(f'"heads" lacks the encoder {name}')
        for name in map(encoder_name, self.levels):
            if name not in self.logit_scale:
                raise ValueError(f'"logit_scale" lacks the encoder {name}')
        if self.image_size not in self.trunks:
            raise ValueError(f'"trunks" lacks the image size, {self.image_size}')
        for path in (*self.trunks.values(), *self.heads.values()):
            if path not in self.files:
                raise ValueError(f'"files" lacks {path}')


@dataclass(frozen=True, slots=True)
class EngineBundle:
    """An engine bundle that has been checked: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> EngineBundle:
        """Open a bundle folder, or "planet" for the one that the package brings.

        Presence and size of every file are always checked; `verify=False` leaves out the SHA-256, which
        costs about a second per gigabyte. Raises BundleError naming the folder, what is wrong and what to do.
        """
        folder = resolve_bundle(path)
        file = folder / MANIFEST
        if not file.is_file():
            raise BundleError(f"{folder} is no engine bundle (it has no {MANIFEST}): {_remedy(folder)}")
        try:
            manifest = Manifest.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            raise BundleError(f"engine bundle {folder}: {MANIFEST} cannot be used: {error}") from error
        for name, entry in manifest.files.items():
            try:
                _check_file(folder, name, entry, verify)
            except (OSError, ValueError) as error:
                raise BundleError(f"engine bundle {folder}: {error}; {_remedy(folder)}") from error
        return cls(folder, manifest)

    @property
    def world(self) -> str:
        """The world that the encoders know: "earth" or "planet"."""
        return self.manifest.world

    @property
    def levels(self) -> tuple[int, ...]:
        """The zooms that have a map encoder, increasing."""
        return self.manifest.levels

    @property
    def embed_dim(self) -> int:
        """The length of an embedding."""
        return self.manifest.embed_dim

    @property
    def image_size(self) -> int:
        """The side in pixels that the encoders work at; a trunk for this side always exists."""
        return self.manifest.image_size

    def trunk_path(self, side: int) -> Path | None:
        """Return the trunk graph for square uint8 pictures of `side` pixels, or None when there is none."""
        name = self.manifest.trunks.get(side)
        return None if name is None else self.path / name

    def head_path(self, encoder: str) -> Path:
        """Return the head graph of an encoder; raises BundleError naming the encoders that exist."""
        name = self.manifest.heads.get(encoder)
        if name is None:
            known = ", ".join(sorted(self.manifest.heads))
            raise BundleError(f"engine bundle {self.path} has no encoder {encoder!r}; it has {known}")
        return self.path / name


def resolve_bundle(spec: str | Path | None) -> Path:
    """Return the folder of the given bundle, else the first of `usual_folders` that holds one.

    "planet" is the bundle that the package brings. No bundle of the planet is ever chosen by itself: a photo
    of Earth would be placed on it. Raises BundleError with the commands that help.
    """
    if spec is not None:
        return PLANET if spec == "planet" else Path(spec)
    for folder in usual_folders():
        if (folder / MANIFEST).is_file():
            if _shows_planet(folder):
                raise BundleError(
                    f"the engine bundle in {folder} is for the built-in planet, not for Earth: "
                    "use --demo, or name that folder with --bundle"
                )
            return folder
    raise BundleError(
        "no engine bundle found: run `geoengine build-engines --out engines/` to make one for Earth, "
        "or `geoengine locate --demo PHOTO` to try the built-in planet"
    )


def usual_folders() -> tuple[Path, Path]:
    """Return where a bundle for Earth is looked for: `./engines`, then the user's data folder.

    The latter is `$XDG_DATA_HOME/geoengine/engines`, by default under `~/.local/share`.
    """
    data_home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path("engines"), Path(data_home) / "geoengine" / "engines"


def _shows_planet(folder: Path) -> bool:
    """Tell whether a bundle is for the planet; a damaged one is not, and says so when it is opened."""
    try:
        return EngineBundle.open(folder, verify=False).world == "planet"
    except BundleError:
        return False


def _remedy(folder: Path) -> str:
    if folder == PLANET:
        return "install geoengine again"
    return f"build it again with `geoengine build-engines --out {folder}`"


def _check_file(folder: Path, name: str, entry: BundleFile, verify: bool) -> None:
    file = folder / name
    # A link inside the folder must not lead out of it either: a downloaded bundle is not trusted.
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads out of the folder")
    if not file.is_file():
        raise ValueError(f"{name} is missing")
    size = file.stat().st_size
    if size != entry.bytes:
        raise ValueError(f"{name} is damaged: it has {size} bytes instead of {entry.bytes}")
    if verify and _sha256(file) != entry.sha256:
        raise ValueError(f"{name} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class _Fields:
    """Typed access to a JSON object; every method raises ValueError naming the field."""

    def __init__(self, data: object) -> None:
        self._data = _typed(data, dict, "the manifest")

    def _get(self, name: str) -> object:
        if name not in self._data:
            raise ValueError(f'"{name}" is missing')
        return self._data[name]

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
