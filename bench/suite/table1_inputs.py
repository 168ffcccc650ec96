"""What Table 1 is measured with besides encoders and tiles: photos, and an index of the first levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from geoengine.bench.truth import PlanetPhotos
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.index.segments import write_segment
from geoengine.engine.index.tile_index import Area, Description, Maker, level_file
from geoengine.engine.manifest import encoder_hash, model_name
from geoengine.engine.photo_sets import PhotoEntry, PhotoSetError, open_photo_set
from geoengine.engine.photos import Photo, read_photo
from geoengine.engine.sources import TileSource
from geoengine.engine.tiles import LngLat

INDEXED = (4, 6, 8)
_SEED = 5


@dataclass(frozen=True, slots=True)
class Photos:
    """Photos that are located, and their places; without places, `why_no_places` says why."""

    title: str
    read: Sequence[Callable[[], Photo]]
    places: Sequence[LngLat | None]
    why_no_places: str = ""


def opened_photos(folder: str | None, bundle: EngineBundle, most: int) -> Photos:
    """Return the first photos of a folder, or drawn ones; raises PhotoSetError where there is none.

    A folder with one table of coordinates gives places. Of drawn photos only those of the planet have some.
    """
    if folder is None:
        drawn = list(PlanetPhotos(most, _SEED))
        if bundle.world == "planet":
            return Photos("photos of the planet", [one.read for one in drawn], [one.place for one in drawn])
        return Photos("drawn photos", [one.read for one in drawn], [], "drawn photos show no place on Earth")
    why = ""
    try:
        entries = list(open_photo_set(folder, need_place=True))
    except PhotoSetError as error:
        entries, why = list(open_photo_set(folder)), str(error)
    if not entries:
        raise PhotoSetError(f"{folder}: there is no photo in it")
    chosen = entries[:most]
    places = [] if why else [entry.place for entry in chosen]
    return Photos(folder, [partial(_read, entry) for entry in chosen], places, why)


def _read(entry: PhotoEntry) -> Photo:
    return read_photo(entry.read(), name=entry.key)


def accuracy_note(bundle: EngineBundle, photos: Photos, spec: str | None) -> str:
    """Return why answers have no accuracy, "" where they have; `spec` names tiles but the suite's."""
    if photos.why_no_places:
        return f"no accuracy: {photos.why_no_places}"
    if bundle.manifest.pretrained == "none":
        return "no accuracy: the encoders' weights are random, and answers mean nothing"
    return "no accuracy: the suite's own tiles show no place" if spec is None else ""


def random_index(
    folder: Path, bundle: EngineBundle, source: TileSource, about: Mapping[str, Any]
) -> Path | None:
    """Return an index of the first levels with random rows, made the first time; None without such levels.

    Scoring takes the time that it takes with true rows, and encoding 70 000 tiles takes an hour. `about`
    names backend and precision.
    """
    zooms = tuple(zoom for zoom in INDEXED if zoom in bundle.levels)
    if folder.exists() or not zooms:
        return folder if zooms else None
    maker = Maker(
        encoder=encoder_hash(bundle.manifest),
        source=source.identity,
        width=bundle.embed_dim,
        model=model_name(bundle.manifest),
        backend=about["backend"],
        variant=about["precision"],
        tiles=source.name,
        attribution="",
        world=bundle.world,
    )
    folder.mkdir()
    rng = np.random.default_rng(_SEED)
    for zoom in zooms:
        ids = np.arange(4**zoom, dtype=np.uint64)
        rows = rng.standard_normal((len(ids), bundle.embed_dim), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        write_segment(level_file(folder, zoom), zoom, ids, ids[:0], bundle.embed_dim, [rows])
    Description(maker=maker, areas=(Area(),), complete=zooms).write(folder)
    return folder
