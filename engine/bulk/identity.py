"""What makes two runs the same job."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from geoengine.engine.bulk.items import Items
from geoengine.engine.bulk.jobs import JobOrder
from geoengine.engine.bulk.stream import PhotoSearch
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.calibration import CALIBRATION
from geoengine.engine.index.tile_index import Description
from geoengine.engine.manifest import encoder_hash, model_name
from geoengine.engine.regions import Region
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import TileSource, fingerprint

_REGION_ZOOM = 8  # at which the tiles of a region tell it from others: the regions' names may be file names


def job_order(
    photos: Items,
    bundle: EngineBundle,
    source: TileSource,
    search: PhotoSearch,
    *,
    backend: str,
    index: Path | None,
    part_photos: int,
) -> JobOrder:
    """Return the job of locating photos; `backend` is what was asked for, with its precision."""
    about = {
        "tiles": source.name,
        "attribution": source.attribution,
        "model": model_name(bundle.manifest),
    }
    return JobOrder(
        identity={
            "photos": photos.identity,
            "encoders": bundle_identity(bundle),
            "backend": backend,
            "tiles": source.identity,
            "index": "" if index is None else fingerprint(repr(Description.read(index))),
            "search": fingerprint(*_options(search.config), str(search.compare_exif)),
        },
        world=bundle.world,
        about=about,
        part_photos=part_photos,
    )


def bundle_identity(bundle: EngineBundle) -> str:
    """Return a hash of what a bundle's encoders compute, GeoCLIP's too, and of its calibration."""
    try:
        calibration = (bundle.path / CALIBRATION).read_bytes()
    except FileNotFoundError:
        calibration = b""
    geoclip = bundle.geoclip()
    gallery = "" if geoclip is None else encoder_hash(geoclip.manifest)
    return fingerprint(encoder_hash(bundle.manifest), calibration, gallery)


def _options(config: SearchConfig) -> list[str]:
    """Return the options of a search as texts, equal for equal searches."""
    texts = []
    for field in fields(config):
        value = getattr(config, field.name)
        texts.append(f"{field.name}={region_identity(value) if field.name == 'within' else value!r}")
    return texts


def region_identity(region: Region | None) -> str:
    """Return what tells a region from others, whatever its name: a hash of its tiles; "" for the world."""
    if region is None:
        return ""
    return fingerprint(region.name, region.tiles(_REGION_ZOOM).tobytes())
