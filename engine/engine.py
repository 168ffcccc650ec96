"""`GeoEngine`: photos in, places out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import GPU_BACKENDS, Backend, open_backend
from geoengine.engine.bundle import EngineBundle, resolve_bundle
from geoengine.engine.calibration import Calibration, RadiusFit
from geoengine.engine.errors import BundleError, SourceError, TileError
from geoengine.engine.index.known_rows import KnownRows, RowCache
from geoengine.engine.index.tile_index import Maker, TileIndex
from geoengine.engine.manifest import PHOTO, encoder_name, model_name
from geoengine.engine.photos import Photo, read_photo
from geoengine.engine.preprocess import to_square
from geoengine.engine.regions import Region, RegionError
from geoengine.engine.results import Level, Location, Scoring
from geoengine.engine.scoring.answer import answer, nearest_radius
from geoengine.engine.scoring.kinds import BEST_TILE, Score
from geoengine.engine.search import LevelDone, Progress, SearchConfig, levels_of, search
from geoengine.engine.sources import TileSource, open_source
from geoengine.engine.sources.decoders import allow_gpu_decoding

if TYPE_CHECKING:
    from PIL.Image import Image

PhotoSource: TypeAlias = Union[Photo, str, os.PathLike[str], bytes, NDArray[np.uint8], "Image"]
"""What `locate` takes for a photo: one already read, or anything that `read_photo` reads."""

DEFAULT_CONFIG = SearchConfig()
_PHOTO_CHUNK = 64


class GeoEngine:
    """Locates photos with the encoders of one bundle over one tile source.

    `GeoEngine.open` is the usual way to make one; a context manager closes the backend and the tile source.
    `index` is an index of some levels' tiles; `row_cache` is a folder in which embeddings of tiles met in
    searches are kept for later ones. Raises BundleError when the encoders know another world than the tiles
    show, TileIndexError when the index is not of these encoders and these tiles.
    """

    def __init__(
        self,
        bundle: EngineBundle,
        source: TileSource,
        backend: Backend,
        *,
        index: TileIndex | None = None,
        row_cache: Path | None = None,
    ) -> None:
        if bundle.world != source.world:
            raise BundleError(
                f"the encoders of engine bundle {bundle.path} know the world {bundle.world!r}, and the tiles "
                f"of {source.name} show {source.world!r}: give a bundle and tiles of the same world"
            )
        self.bundle = bundle
        self.source = source
        self.backend = backend
        if backend.name in GPU_BACKENDS:
            allow_gpu_decoding()
        self.known: KnownRows | None = None
        if index is not None:
            index.check_fits(bundle, source)
        cache = None
        if row_cache is not None and source.storable:
            cache = RowCache(row_cache, Maker.of(bundle, source, backend))
        if index is not None or cache is not None:
            self.known = KnownRows(bundle.embed_dim, index, cache)

    @classmethod
    def open(
        cls,
        bundle: str | Path | None = None,
        tiles: str | TileSource | None = None,
        *,
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
        index: str | Path | None = None,
        row_cache: Path | None = None,
    ) -> GeoEngine:
        """Open a bundle, a tile source and a backend.

        `bundle` is a folder, "planet", or None for what `resolve_bundle` finds; `tiles` is what `open_source`
        takes, or an open source, which the engine then owns. Without `tiles`, a bundle of the built-in planet
        gets the planet's tiles, and one of Earth raises SourceError. `backend`, `precision` and
        `threads` are those of `open_backend`. `index` is the folder of a tile index; `row_cache` is as above.
        """
        opened = EngineBundle.open(resolve_bundle(bundle))
        if tiles is None:
            if opened.world != "planet":
                raise SourceError(
                    "no tile source given: name a URL template with {z}, {x} and {y}, an .mbtiles or "
                    ".pmtiles file, or a folder"
                )
            tiles = "planet"
        with ExitStack() as undo:
            if isinstance(tiles, str):
                source = open_source(tiles)
                undo.callback(source.close)
            else:
                source = tiles
            opened_backend = open_backend(opened, backend=backend, precision=precision, threads=threads)
            undo.callback(opened_backend.close)
            opened_index = None if index is None else TileIndex(Path(index))
            engine = cls(opened, source, opened_backend, index=opened_index, row_cache=row_cache)
            undo.pop_all()
        return engine

    def __enter__(self) -> GeoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the backend and the tile source."""
        with ExitStack() as stack:
            stack.callback(self.source.close)
            stack.callback(self.backend.close)

    def locate(
        self,
        photos: Sequence[PhotoSource],
        *,
        config: SearchConfig = DEFAULT_CONFIG,
        progress: Progress | None = None,
        on_level: LevelDone | None = None,
    ) -> list[Location]:
        """Return where each photo may have been taken, in the order of the photos.

        Photos of one call share the tiles that they have in common, and each result is the one that the photo
        would have got alone. `progress` and `on_level` are called as `Progress` and `LevelDone` say.

        Raises PhotoError for a photo that cannot be read (use `read_photo` first to go on with the others),
        TileError for a level without an encoder, and what the source, the backend and the callbacks raise.
        """
        if isinstance(photos, str | bytes | os.PathLike | np.ndarray | Photo):
            raise TypeError(f"locate takes a list of photos, got one {type(photos).__name__}")
        self._check_levels(config.levels)
        self.check_region(config.within)
        calibration = self.bundle.calibration or Calibration.assumed(self.bundle.manifest)
        config = self.resolved(config)
        start = time.perf_counter()
        read = [self.prepare(photo) for photo in photos]
        embeddings = self.embed_photos(read)
        found = search(
            embeddings,
            self.source,
            self.backend,
            config,
            known=self.known,
            calibration=calibration,
            progress=progress,
            on_level=on_level,
        )
        seconds = (time.perf_counter() - start) / max(1, len(read))
        return [
            self._location(photo, levels, config, calibration, seconds)
            for photo, levels in zip(read, found, strict=True)
        ]

    def resolved(self, config: SearchConfig) -> SearchConfig:
        """Return a configuration whose score is chosen: that of the bundle where it was None."""
        if config.score is not None:
            return config
        calibration = self.bundle.calibration
        fitted = calibration is not None and calibration.fitted
        return replace(config, score=Score.path if fitted else Score.paper)

    def prepare(self, photo: PhotoSource) -> Photo:
        """Read a photo and keep only the square that the encoder sees: many that wait stay small."""
        whole = photo if isinstance(photo, Photo) else read_photo(photo)
        size, mode = self.bundle.image_size, self.bundle.manifest.resize_mode
        return Photo(whole.name, to_square(whole.pixels, size, mode))

    def embed_photos(self, photos: Sequence[Photo]) -> NDArray[np.float32]:
        """Return the photo encoder's unit embeddings, float32[n, d], in the order of the photos."""
        embeddings = np.empty((len(photos), self.bundle.embed_dim), dtype=np.float32)
        for start in range(0, len(photos), _PHOTO_CHUNK):
            chunk = photos[start : start + _PHOTO_CHUNK]
            squares = np.stack([self.prepare(photo).pixels for photo in chunk])
            embeddings[start : start + len(chunk)] = self.backend.encode(PHOTO, squares)
        return embeddings

    def _check_levels(self, levels: Sequence[int]) -> None:
        unknown = [zoom for zoom in levels if zoom not in self.bundle.levels]
        if unknown:
            known = ", ".join(map(str, self.bundle.levels))
            raise TileError(
                f"no map encoder for level {', '.join(map(str, unknown))}: "
                f"engine bundle {self.bundle.path} has levels {known}"
            )

    def check_region(self, within: Region | None, *, land: bool = False) -> None:
        """Raise RegionError for a place on Earth, or Earth's `land`, when the tiles show another world."""
        of_earth = land or (within is not None and within.of_earth)
        if of_earth and self.bundle.world != "earth":
            name = "land" if land or within is None else within.name
            raise RegionError(f"{name} is on Earth, and the {self.bundle.world} is not: give a box")

    def _levels(self, config: SearchConfig) -> list[int]:
        return levels_of(self.source, config.levels, overzoom=config.overzoom)

    def _location(
        self,
        photo: Photo,
        levels: tuple[Level, ...],
        config: SearchConfig,
        calibration: Calibration,
        seconds: float,
    ) -> Location:
        manifest = self.bundle.manifest
        of_path = config.score is Score.path
        fit = calibration.fit(centred=config.centred) if of_path else None
        radius = nearest_radius(fit, config.k)
        found = answer(
            levels,
            top=config.top,
            objective=config.objective,
            sharpness=1.0 if of_path else manifest.logit_scale[encoder_name(levels[-1].zoom)],
            radius=radius,
            calibrated=radius is not None and self._as_calibrated(config, radius, levels[-1]),
        )
        return Location(
            photo=photo.name,
            world=self.bundle.world,
            point=found.candidates[0].point,
            score=found.candidates[0].score,
            radius_km=found.radius_km,
            candidates=found.candidates,
            levels=levels,
            k=config.k,
            tiles=self.source.name,
            attribution=self.source.attribution,
            model=model_name(manifest),
            seconds=seconds,
            within="" if config.within is None else config.within.name,
            left_out=tuple(sorted(set(config.levels) - set(self._levels(config)))),
            scoring=Scoring(
                score=str(config.score),
                calibrated=of_path and calibration.fitted,
                centred=config.centred,
                quota=config.quota,
                objective=str(config.objective),
                prior=config.prior or "",
            ),
            radius_share=found.radius_share,
            radius_calibrated=found.radius_calibrated,
            radii_km=found.radii_km,
        )

    def _as_calibrated(self, config: SearchConfig, radius: RadiusFit, last: Level) -> bool:
        """Whether a search is of the kind whose radii were fitted."""
        plain = config.quota is None and config.prior is None and config.objective == BEST_TILE
        return plain and config.k == radius.k and last.zoom == self.bundle.levels[-1]
