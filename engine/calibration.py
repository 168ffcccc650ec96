"""What `geoengine calibrate` found out about a bundle's encoders: how far their cosines can be trusted.

`calibration.json` lies beside the bundle's manifest, which does not name it: a bundle without one works too.
It carries a checksum of itself and the hash of the encoders that it was fitted for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.errors import BundleError, GeoEngineError
from geoengine.engine.manifest import Manifest, encoder_name
from geoengine.engine.scoring.kinds import Score

CALIBRATION = "calibration.json"
SCHEMA = 1

_REMEDY = "run `geoengine calibrate` again, or delete that file to go without"

NOT_CENTRED = (
    "centred cosines need the mean embedding of each level's tiles, and this bundle's calibration has none: "
    "`geoengine calibrate` computes them"
)


class Among(StrEnum):
    """Which tiles share the softmax of a level below the first: all `candidates`, or the `siblings`."""

    candidates = "candidates"
    siblings = "siblings"


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelFit:
    """One level's part in the path score, see `engine.scoring.path.path_scores`.

    `scale` is 1 / tau, `weight` w, `inherited` gamma, `among` says which tiles share the softmax. `evidence`
    maps names of `TileEvidence` to their weights lambda.
    """

    scale: float
    weight: float = 1.0
    inherited: float = 1.0
    among: Among = Among.candidates
    evidence: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RadiusFit:
    """How the last beam's path scores become a distribution over places; see `engine.scoring.mass`.

    Of beam width `k`: `sharpness` multiplies the scores in a softmax, `elsewhere` is the share of the whole
    world, and `shares` are the modelled shares that hold the truth as often as each of `STATED_SHARES` says.
    """

    k: int
    sharpness: float
    elsewhere: float
    shares: tuple[float, ...]


STATED_SHARES = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""The shares, 0.05 to 0.95, whose radii are calibrated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The fit of one kind of search: its levels by zoom, and for each score its radii by beam width."""

    levels: Mapping[int, LevelFit]
    radii: Mapping[Score, tuple[RadiusFit, ...]] = field(default_factory=dict)

    def level(self, zoom: int) -> LevelFit:
        """Return the fit of a level; raises GeoEngineError where there is none."""
        if zoom not in self.levels:
            known = ", ".join(map(str, sorted(self.levels)))
            raise GeoEngineError(f"the calibration has no level {zoom}, only {known}: calibrate again")
        return self.levels[zoom]


def kind_of(*, centred: bool, evidence: Iterable[str] = ()) -> str:
    """Return the name of a kind of search: "plain", "centred", "centred+geoclip" and so on."""
    return "+".join(["centred" if centred else "plain", *sorted(evidence)])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """The fits of a bundle by kind of search, as `kind_of` names them; "plain" is always there.

    `means` maps zooms to the mean embedding of their tiles, float32[d], which a centred search subtracts.
    `encoders` is the hash of the encoders, "" for `assumed`. `dataset`, `photos` and `seed` say on what it
    was fitted, for people; `identity` tells the set of photos from others.
    """

    fits: Mapping[str, Fit]
    means: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    encoders: str = ""
    dataset: str = ""
    identity: str = ""
    photos: int = 0
    seed: int = 0

    @classmethod
    def assumed(cls, manifest: Manifest) -> Calibration:
        """Return what is taken where nothing was fitted: the training's logit scales, all weights 1."""
        levels = {zoom: LevelFit(scale=manifest.logit_scale[encoder_name(zoom)]) for zoom in manifest.levels}
        return cls(fits={"plain": Fit(levels=levels)})

    @classmethod
    def read(cls, folder: Path, encoders: str) -> Calibration | None:
        """Read the calibration in a bundle's folder, None when there is none.

        Raises BundleError when it is damaged, of another version, or not of the bundle's `encoders`.
        """
        file = folder / CALIBRATION
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} cannot be read: {error}; {_REMEDY}") from None
        try:
            calibration = cls._from_json(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise BundleError(f"{file} cannot be used: {error}; {_REMEDY}") from None
        if calibration.encoders != encoders:
            raise BundleError(f"{file} was fitted for other encoders than those of its bundle; {_REMEDY}")
        return calibration

    def write(self, folder: Path) -> None:
        """Put the calibration in a bundle's folder; an old one stays when that fails. Raises OutputError."""
        from geoengine.engine.render.files import write_atomically

        data = self._to_json()
        write_atomically(
            folder / CALIBRATION, json.dumps({"checksum": _checksum(data), **data}, indent=1) + "\n"
        )

    def _to_json(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "schema": SCHEMA,
            "geoengine": version("geoengine"),
            "encoders": self.encoders,
            "dataset": self.dataset,
            "identity": self.identity,
            "photos": self.photos,
            "seed": self.seed,
            "fits": {kind: _fit_to_json(fit) for kind, fit in self.fits.items()},
            "means": {
                str(zoom): base64.b64encode(mean.astype("<f4").tobytes()).decode("ascii")
                for zoom, mean in self.means.items()
            },
        }

    @classmethod
    def _from_json(cls, data: Any) -> Calibration:  # noqa: ANN401 - whatever the file holds
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, dict) else None
            raise ValueError(f"this version reads schema {SCHEMA}, got {schema!r:.40}")
        if data.pop("checksum", None) != _checksum(data):
            raise ValueError("it is damaged: its checksum is not the one in it")
        if "plain" not in data["fits"]:
            raise ValueError("it has no fit of plain searches")
        return cls(
            fits={kind: _fit_from_json(fit) for kind, fit in data["fits"].items()},
            means={
                int(zoom): np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
                for zoom, text in data["means"].items()
            },
            encoders=str(data["encoders"]),
            dataset=str(data["dataset"]),
            identity=str(data["identity"]),
            photos=int(data["photos"]),
            seed=int(data["seed"]),
        )

    @property
    def fitted(self) -> bool:
        """Whether it was fitted on photos."""
        return bool(self.encoders)

    @property
    def zooms(self) -> tuple[int, ...]:
        """The zooms of the tiles that it was fitted on, in order; none where that was not kept."""
        return tuple(sorted(self.means))

    def fit(self, *, centred: bool, evidence: Iterable[str] = ()) -> Fit:
        """Return the fit of a kind of search, or that without the evidence if only that is known.

        Raises GeoEngineError for centred cosines where they were not fitted.
        """
        alone = kind_of(centred=centred)
        if alone not in self.fits:
            raise GeoEngineError(NOT_CENTRED)
        return self.fits.get(kind_of(centred=centred, evidence=evidence), self.fits[alone])

    def mean(self, zoom: int) -> NDArray[np.float32]:
        """Return the mean embedding of a zoom's tiles, float32[d]; raises GeoEngineError without one."""
        if zoom not in self.means:
            raise GeoEngineError(NOT_CENTRED)
        return self.means[zoom]


def _checksum(data: dict[str, Any]) -> str:
    """Return the SHA-256, in hex, of all else that the file says."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _fit_to_json(fit: Fit) -> dict[str, Any]:
    return {
        "levels": {str(zoom): asdict(level) for zoom, level in sorted(fit.levels.items())},
        "radii": {str(score): [asdict(radius) for radius in radii] for score, radii in fit.radii.items()},
    }


def _fit_from_json(data: dict[str, Any]) -> Fit:
    return Fit(
        levels={int(zoom): _level_from_json(level) for zoom, level in data["levels"].items()},
        radii={Score(score): tuple(map(_radius_from_json, radii)) for score, radii in data["radii"].items()},
    )


def _level_from_json(data: dict[str, Any]) -> LevelFit:
    return LevelFit(
        scale=_finite(data["scale"]),
        weight=_finite(data["weight"]),
        inherited=_finite(data["inherited"]),
        among=Among(data["among"]),
        evidence={str(name): _finite(value) for name, value in data["evidence"].items()},
    )


def _radius_from_json(data: dict[str, Any]) -> RadiusFit:
    shares = tuple(map(_finite, data["shares"]))
    if len(shares) != len(STATED_SHARES):
        raise ValueError(f"each radius must have {len(STATED_SHARES)} shares, got {len(shares)}")
    return RadiusFit(
        k=int(data["k"]),
        sharpness=_finite(data["sharpness"]),
        elsewhere=_finite(data["elsewhere"]),
        shares=shares,
    )


def _finite(value: Any) -> float:  # noqa: ANN401 - whatever the file holds
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"its numbers must be finite and not negative, got {value!r:.40}")
    return number
