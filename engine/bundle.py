"""Engine bundles: a folder with a manifest and every compiled encoder, checked before anything is loaded.

```
manifest.json                       what `Manifest` holds, as JSON, with the checksum of each graph
onnx/trunk.<side>.<variant>.onnx    uint8[n, side, side, 3] -> tokens; the layers that all encoders share
onnx/head_<encoder>.<variant>.onnx  tokens -> unit embedding; `<encoder>` is "photo", "z04", "z06" ...
onnx/*.weights                      weights that graphs share
tensorrt/<machine>/                 what TensorRT compiled from the graphs on some machine
calibration.json                    what `geoengine calibrate` fitted, where it ran; not in the manifest
geoclip/                            a bundle of GeoCLIP, if there is one: "photo" is its photo encoder
```
A folder that has only `geoclip/` opens as that bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from geoengine.engine.calibration import Calibration
from geoengine.engine.errors import BundleError
from geoengine.engine.manifest import MANIFEST, BundleFile, Graphs, Manifest, Variant, encoder_hash

PLANET = Path(__file__).parent / "data" / "planet"
"""The ready bundle of the built-in planet, which the package brings."""

GEOCLIP = "geoclip"
"""The folder inside a bundle's that has the bundle of GeoCLIP."""

_HASH_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class EngineBundle:
    """An engine bundle that has been checked: its folder, its manifest, and its calibration if it has one."""

    path: Path
    manifest: Manifest
    calibration: Calibration | None = field(default=None, compare=False)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, calibrated: bool = True) -> EngineBundle:
        """Open a bundle folder, or "planet" for the one that the package brings.

        Presence and size of every file are always checked; `verify=False` leaves out the SHA-256, which
        costs about a second per gigabyte. `calibrated=False` leaves out the calibration, which may be that of
        an older bundle. Raises BundleError naming the folder, what is wrong and what to do.
        """
        folder = resolve_bundle(path)
        if not (folder / MANIFEST).is_file() and (folder / GEOCLIP / MANIFEST).is_file():
            folder = folder / GEOCLIP
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
        calibration = Calibration.read(folder, encoder_hash(manifest)) if calibrated else None
        return cls(folder, manifest, calibration)

    def check_unchanged(self) -> None:
        """Raise BundleError when another bundle has been put in the place of this one since it was opened.

        To be asked after a file was read: encoders of two bundles would go together without an error.
        """
        if EngineBundle.open(self.path, verify=False, calibrated=False).manifest.files != self.manifest.files:
            raise BundleError(
                f"engine bundle {self.path} has been replaced by another one while it was in use: "
                "run the command again"
            )

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

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that the bundle has."""
        return tuple(self.manifest.graphs)

    @property
    def has_geoclip(self) -> bool:
        """Whether there is a GeoCLIP in it, or it is one; `geoclip` checks whether it is whole."""
        return self.manifest.geoclip is not None or (self.path / GEOCLIP / MANIFEST).is_file()

    def geoclip(self) -> EngineBundle | None:
        """Return GeoCLIP's bundle: this one, the one inside it, or None; raises as `open` does."""
        if self.manifest.geoclip is not None:
            return self
        folder = self.path / GEOCLIP
        return EngineBundle.open(folder) if (folder / MANIFEST).is_file() else None

    def trunk_path(self, side: int, variant: Variant) -> Path | None:
        """Return the trunk for square uint8 pictures of `side` pixels, or None when there is none.

        Raises BundleError for a variant that the bundle lacks.
        """
        name = self._graphs(variant).trunks.get(side)
        return None if name is None else self.path / name

    def head_path(self, encoder: str, variant: Variant) -> Path:
        """Return an encoder's head; raises BundleError for an encoder or a variant that the bundle lacks."""
        heads = self._graphs(variant).heads
        if encoder not in heads:
            known = ", ".join(sorted(heads))
            raise BundleError(f"engine bundle {self.path} has no encoder {encoder!r}; it has {known}")
        return self.path / heads[encoder]

    def _graphs(self, variant: Variant) -> Graphs:
        graphs = self.manifest.graphs.get(variant)
        if graphs is None:
            raise BundleError(
                f"engine bundle {self.path} has no {variant} graphs; it has {', '.join(self.variants)}"
            )
        return graphs


def resolve_bundle(spec: str | Path | None) -> Path:
    """Return the folder of the given bundle, else the first of `usual_folders` that holds one.

    "planet" is the bundle that the package brings. No bundle of the planet is ever chosen by itself: a photo
    of Earth would be placed on it. Raises BundleError with the commands that help.
    """
    if spec is not None:
        return PLANET if spec == "planet" else Path(spec)
    for folder in usual_folders():
        if (folder / MANIFEST).is_file() or (folder / GEOCLIP / MANIFEST).is_file():
            if _shows_planet(folder):
                raise BundleError(
                    f"the engine bundle in {folder} is for the built-in planet, not for Earth: "
                    "use --demo, or name that folder with --bundle"
                )
            return folder
    raise BundleError(
        "no engine bundle found: run `geoengine build-engines --geoclip --out engines/` to make one for "
        "`locate --method geoclip`, `geoengine build-engines --out engines/` to make one with map encoders, "
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
    if folder.name == GEOCLIP:
        return f"build it again with `geoengine build-engines --geoclip --out {folder.parent}`"
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
