"""What a build, a check or a compilation found out about a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geoengine.engine.backends import ONNXRUNTIME_CPU
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.manifest import MANIFEST, PHOTO, Variant
from geoengine.export.parity import Measurement


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRow:
    """One graph run by one backend: its agreement with PyTorch fp32, and its speed.

    A trunk's figures are those of the photo encoder at the trunk's side, a head's those of its encoder.
    Speeds are of trunk and head together, on this machine; of GeoCLIP's location
    encoder and of its gallery they are points per second. `bytes` are the file's, without shared weights.
    """

    artifact: str
    variant: str
    backend: str
    min_cosine: float
    mean_cosine: float
    images_per_second: float
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """What was built or checked; `bytes` is the size of the whole bundle, `seconds` what the work took.

    `skipped` has the backends that could not run here, with the reason.
    """

    path: Path
    model: str
    pretrained: str
    world: str
    rows: tuple[ReportRow, ...]
    skipped: tuple[tuple[str, str], ...]
    bytes: int
    seconds: float

    @property
    def random(self) -> bool:
        """Whether the weights are random, so that nothing but speed means anything."""
        return self.pretrained == "none"

    def joined(self, inner: BuildReport, folder: str) -> BuildReport:
        """Return one report of this bundle and of the one in its `folder`."""
        rows = tuple(replace(row, artifact=f"{folder}/{row.artifact}") for row in inner.rows)
        return replace(
            self, rows=self.rows + rows, bytes=self.bytes + inner.bytes, seconds=self.seconds + inner.seconds
        )


def make_report(
    bundle: EngineBundle,
    results: Sequence[Measurement],
    skipped: Mapping[str, str],
    seconds: float,
    geoclip: Mapping[str, Mapping[str, Any]],
) -> BuildReport:
    """Lay the measurements out by graph and backend; `geoclip` are the figures of `check_geoclip`, if any."""
    manifest = bundle.manifest
    rows = []
    for result in results:
        graphs = manifest.graphs[result.variant]
        files = [graphs.trunks[result.side]] if result.encoder == PHOTO else []
        if result.side == manifest.image_size:
            files.append(graphs.heads[result.encoder])
        rows += [_row(file, result, manifest.files[file].bytes) for file in files]
    if manifest.geoclip is not None and geoclip:
        named = {"location": manifest.geoclip.location, "gallery": manifest.geoclip.embeddings}
        rows += [_points_row(file, geoclip[name], manifest.files[file].bytes) for name, file in named.items()]
    return BuildReport(
        path=bundle.path,
        model=manifest.model,
        pretrained=manifest.pretrained,
        world=manifest.world,
        rows=tuple(rows),
        skipped=tuple(skipped.items()),
        bytes=sum(entry.bytes for entry in manifest.files.values())
        + (bundle.path / MANIFEST).stat().st_size
        + sum(file.stat().st_size for file in (bundle.path / "tensorrt").rglob("*") if file.is_file()),
        seconds=seconds,
    )


def _row(file: str, result: Measurement, size: int) -> ReportRow:
    cosines = result.cosines
    return ReportRow(
        artifact=file,
        variant=result.variant,
        backend=result.backend,
        min_cosine=min(cosines),
        mean_cosine=sum(cosines) / len(cosines),
        images_per_second=result.images_per_second,
        bytes=size,
    )


def _points_row(file: str, figures: Mapping[str, Any], size: int) -> ReportRow:
    """Return the row of GeoCLIP's location encoder or gallery; what it encodes are points."""
    return ReportRow(
        artifact=file,
        variant=Variant.fp32,
        backend=ONNXRUNTIME_CPU,
        min_cosine=figures["min_cosine"],
        mean_cosine=figures["mean_cosine"],
        images_per_second=figures["points_per_second"],
        bytes=size,
    )


def parity_table(results: Sequence[Measurement]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the manifest's figures: cosines to PyTorch by variant and encoder, over sides and backends."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for variant, encoder in dict.fromkeys((result.variant, result.encoder) for result in results):
        cosines = [c for r in results if (r.variant, r.encoder) == (variant, encoder) for c in r.cosines]
        table.setdefault(variant, {})[encoder] = {
            "min_cosine": round(min(cosines), 8),
            "mean_cosine": round(sum(cosines) / len(cosines), 8),
            "images": len(cosines),
        }
    return table
