"""The figures of an evaluation, from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.accuracy import Accuracy, Share, accuracy, errors_km, wilson_share
from geoengine.bench.evaluate import setting_of
from geoengine.bench.evaluate_rows import PhotoRow, Results, Setting
from geoengine.bench.suite.machine import describe
from geoengine.bench.truth import TruthError, TruthSet
from geoengine.engine.doctor.gpu import cuda_devices
from geoengine.engine.engine import GeoEngine
from geoengine.engine.manifest import model_name
from geoengine.engine.search import SearchConfig

SCHEMA = 1
"""Of the JSON report; grows when a member changes its meaning or goes away."""

HAVERSINE = "great circle, R = 6371.0088 km"
GEODESIC = "geodesic on WGS84"


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingFigures:
    """The figures of one setting over all photos of the set.

    `recall` maps each level's zoom to the share of photos whose true tile was in that level's beam; levels
    that were not searched are left out, and a photo whose search ended before a level counts as a miss
    there. `calibration` maps stated shares to the share of photos, of those with an answer, that lie inside
    the radius stated for them; the radii are `calibrated` when they were fitted.

    `tiles_per_photo` are tiles scored, each counted once for the photos located together, `seconds_per_photo`
    is the wall time of embedding photos and searching; both, and `coverage`, the part of the wanted tiles
    that had a picture, are over the photos that could be read. NaN when there are none.
    """

    setting: Setting
    errors: NDArray[np.float64]
    accuracy: Accuracy
    recall: dict[int, Share]
    calibration: dict[float, Share]
    calibrated: bool
    tiles_per_photo: float
    seconds_per_photo: float
    coverage: float

    @property
    def tiles_per_second(self) -> float:
        """Tiles scored per second of wall time."""
        return self.tiles_per_photo / self.seconds_per_photo

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values; NaN becomes None."""
        costs = {
            "tiles_per_photo": self.tiles_per_photo,
            "seconds_per_photo": self.seconds_per_photo,
            "tiles_per_second": self.tiles_per_second,
            "coverage": self.coverage,
        }
        return {
            **self.setting._asdict(),
            **self.accuracy.to_dict(),
            "recall": {str(zoom): share.to_dict() for zoom, share in self.recall.items()},
            "calibration": [
                {"stated": stated, **inside.to_dict()} for stated, inside in self.calibration.items()
            ],
            "radius_calibrated": self.calibrated,
            **{name: None if np.isnan(value) else value for name, value in costs.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """An evaluation: what was evaluated, with what, and the figures of each setting in the order asked for.

    `rows` are those of the settings asked for, in the order of the set. `wanted` is how many photos the set
    has by its published description, None where there is none. `together` photos were located at a time; with
    `reused`, embeddings of tiles that earlier searches had met were not computed again.
    """

    data_set: str
    title: str
    world: str
    wanted: int | None
    remarks: tuple[str, ...]
    model: str
    tiles: str
    attribution: str
    backend: str
    together: int
    geodesic: bool
    reused: bool
    job: Mapping[str, Any]
    results: tuple[SettingFigures, ...]
    rows: tuple[PhotoRow, ...]
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())  # whose load changes

    @property
    def photos(self) -> int:
        """The number of photos, those included that could not be read."""
        return self.results[0].accuracy.photos

    @property
    def problems(self) -> dict[str, str]:
        """What was wrong with the photos that could not be read."""
        return {row.photo: row.problem for row in self.rows if row.problem}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values, with the machine it was made on."""
        return {
            "schema": SCHEMA,
            "data_set": {
                "name": self.data_set,
                "title": self.title,
                "world": self.world,
                "photos": self.photos,
                "published_photos": self.wanted,
                "unreadable": len(self.problems),
                "remarks": list(self.remarks),
            },
            "model": self.model,
            "tiles": self.tiles,
            "attribution": self.attribution,
            "backend": self.backend,
            "photos_together": self.together,
            "embeddings_reused": self.reused,
            "distance": GEODESIC if self.geodesic else HAVERSINE,
            "job": dict(self.job),
            "machine": dict(self.machine),
            "results": [figures.to_dict() for figures in self.results],
        }


def make_report(
    engine: GeoEngine,
    truth: TruthSet,
    configs: Sequence[SearchConfig],
    results: Results,
    *,
    together: int,
    geodesic: bool = False,
) -> Report:
    """Return the figures of the rows of a set's photos; raises TruthError when the set is empty.

    Every photo of the set has a row for every configuration.
    """
    keys = [photo.key for photo in truth]
    if not keys:
        raise TruthError(f"{truth.title}: there is no photo to evaluate with")
    settings = [setting_of(config) for config in configs]
    rows = {setting: [_row(results, setting, key) for key in keys] for setting in settings}
    return Report(
        data_set=truth.name,
        title=truth.title,
        world=truth.world,
        wanted=truth.wanted,
        remarks=tuple(truth.remarks()),
        model=_models(engine, configs),
        tiles=engine.source.name,
        attribution=engine.source.attribution,
        backend=f"{engine.backend.name} {engine.backend.variant}",
        together=together,
        geodesic=geodesic,
        reused=engine.known is not None and engine.known.cache is not None,
        job=results.job,
        results=tuple(figures_of(setting, rows[setting], geodesic) for setting in settings),
        rows=tuple(row for setting in settings for row in rows[setting]),
    )


def _models(engine: GeoEngine, configs: Sequence[SearchConfig]) -> str:
    """Return the names of the encoders that the configurations ask."""
    names = []
    if any(config.method.searches for config in configs):
        names.append(model_name(engine.bundle.manifest))
    if any(config.method.asks_geoclip for config in configs):
        names.append(model_name(engine.geoclip().bundle.manifest))
    return ", ".join(names)


def _row(results: Results, setting: Setting, key: str) -> PhotoRow:
    row = results.row(setting, key)
    if row is None:
        raise TruthError(f"{key}: not evaluated; run the same command again")
    return row


def figures_of(setting: Setting, rows: Sequence[PhotoRow], geodesic: bool) -> SettingFigures:
    """Return the figures of one setting's rows, of which there is at least one."""
    errors = errors_km([row.place for row in rows], [row.true for row in rows], geodesic=geodesic)
    read = [row for row in rows if not row.problem]
    zooms = sorted({zoom for row in read for zoom in row.ranks})
    shares = sorted({share for row in read for share in row.radii_km})
    wanted = sum(row.wanted for row in read)
    return SettingFigures(
        setting=setting,
        errors=errors,
        accuracy=accuracy(errors),
        recall={zoom: wilson_share(_kept(rows, zoom), len(rows)) for zoom in zooms},
        calibration={share: _inside(rows, errors, share) for share in shares},
        calibrated=bool(read) and all(row.calibrated for row in read),
        tiles_per_photo=_mean(row.tiles for row in read),
        seconds_per_photo=_mean(row.seconds for row in read),
        coverage=sum(row.scored for row in read) / wanted if wanted else float("nan"),
    )


def _kept(rows: Iterable[PhotoRow], zoom: int) -> int:
    return sum(row.ranks.get(zoom, 0) > 0 for row in rows)


def _inside(rows: Sequence[PhotoRow], errors: NDArray[np.float64], share: float) -> Share:
    """Return how many of the photos with an answer lie within the radius stated for a share."""
    stated = [(row.radii_km[share], error) for row, error in zip(rows, errors, strict=True) if row.radii_km]
    return wilson_share(sum(bool(error <= radius) for radius, error in stated), len(stated))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")


def machine() -> dict[str, Any]:
    """Return the machine as `describe` does, and what reports of this schema have besides."""
    about = describe()
    return {
        **about,
        "gpus": cuda_devices(),
        "memory": f"{about['memory_gib']} GiB",
        "geoengine": about["packages"]["geoengine"],
    }
