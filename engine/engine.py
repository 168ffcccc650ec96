"""`GeoEngine`: photos in, places out."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import GPU_BACKENDS, Backend, open_backend
from geoengine.engine.bundle import EngineBundle, resolve_bundle
from geoengine.engine.calibration import Calibration, RadiusFit
from geoengine.engine.errors import BundleError, SourceError, TileError
from geoengine.engine.geoclip import GeoClip, TwoSquares, no_map_encoders
from geoengine.engine.geoclip.answer import APART_KM, gallery_location
from geoengine.engine.index.known_rows import KnownRows, RowCache
from geoengine.engine.index.tile_index import Maker, TileIndex
from geoengine.engine.manifest import PHOTO, encoder_name, model_name
from geoengine.engine.photos import Photo, read_photo
from geoengine.engine.preprocess import to_square
from geoengine.engine.regions import Region, RegionError
from geoengine.engine.results import Level, Location, Scoring
from geoengine.engine.scoring.answer import answer, fitted_radius
from geoengine.engine.scoring.density import Density, open_prior
from geoengine.engine.scoring.evidence import TileEvidence
from geoengine.engine.scoring.kinds import BEST_TILE, Method, Score
from geoengine.engine.search import LevelDone, Progress, SearchConfig, levels_of, search
from geoengine.engine.sources import TileSource, open_source
from geoengine.engine.sources.decoders import allow_gpu_decoding
from geoengine.engine.sources.nothing import NO_TILES, NoTiles
from geoengine.engine.tiles import LngLat

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
    show, TileIndexError when the index is not of these encoders and these tiles. `geoclip` opens GeoCLIP when
    it is first needed; None stands for the bundle's.
    """

    def __init__(
        self,
        bundle: EngineBundle,
        source: TileSource,
        backend: Backend,
        *,
        index: TileIndex | None = None,
        row_cache: Path | None = None,
        geoclip: Callable[[], GeoClip] | None = None,
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
        self._open_geoclip = geoclip or partial(GeoClip.open, bundle, cache=row_cache)
        if bundle.manifest.geoclip is not None:
            self._open_geoclip = partial(GeoClip, bundle, backend, cache=row_cache)
        self._geoclip: GeoClip | None = None
        self._priors: dict[str, Density] = {}
        self._opening = threading.Lock()
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
        gets the planet's tiles, one of Earth with GeoCLIP locates by `Method.geoclip` only, and any other
        raises SourceError. `backend`, `precision` and `threads` are those of `open_backend`, for GeoCLIP too.
        `index` is the folder of a tile index; `row_cache` is as above.
        """
        opened = EngineBundle.open(resolve_bundle(bundle))
        if tiles is None:
            if opened.world != "planet" and not opened.has_geoclip:
                raise SourceError(NO_TILES)
            tiles = "planet" if opened.world == "planet" else NoTiles(opened.world)
        with ExitStack() as undo:
            if isinstance(tiles, str):
                source = open_source(tiles)
                undo.callback(source.close)
            else:
                source = tiles
            opened_backend = open_backend(opened, backend=backend, precision=precision, threads=threads)
            undo.callback(opened_backend.close)
            opened_index = None if index is None else TileIndex(Path(index))
            geoclip = partial(
                GeoClip.open, opened, backend=backend, precision=precision, threads=threads, cache=row_cache
            )
            engine = cls(
                opened, source, opened_backend, index=opened_index, row_cache=row_cache, geoclip=geoclip
            )
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
            if self._geoclip is not None:
                stack.callback(self._geoclip.close)

    def geoclip(self) -> GeoClip:
        """Return the bundle's GeoCLIP, which is opened once; raises BundleError when there is none."""
        with self._opening:
            if self._geoclip is None:
                self._geoclip = self._open_geoclip()
            return self._geoclip

    def locate(
        self,
        photos: Sequence[PhotoSource],
        *,
        config: SearchConfig = DEFAULT_CONFIG,
        method: Method | str | None = None,
        progress: Progress | None = None,
        on_level: LevelDone | None = None,
    ) -> list[Location]:
        """Return where each photo may have been taken, in the order of the photos.

        Photos of one call share the tiles that they have in common, and each result is the one that the photo
        would have got alone. `method`, a `Method` or its name, takes the place of the configuration's.
        `progress` and `on_level` are called as `Progress` and `LevelDone` say; with `Method.geoclip`, which
        has no levels, they are not.

        Raises PhotoError for a photo that cannot be read (use `read_photo` first to go on with the others),
        TileError for a level without an encoder, BundleError for a method that needs a GeoCLIP that is not
        there, and what the source, the backend and the callbacks raise.
        """
        if isinstance(photos, str | bytes | os.PathLike | np.ndarray | Photo):
            raise TypeError(f"locate takes a list of photos, got one {type(photos).__name__}")
        if method is not None:
            config = replace(config, method=Method.parse(method))
        self.check_region(config.within)
        if not config.method.searches:
            return self._locate_in_gallery(photos, config)
        self._check_levels(config.levels)
        if isinstance(self.source, NoTiles):
            raise SourceError(NO_TILES)
        calibration = self.bundle.calibration or Calibration.assumed(self.bundle.manifest)
        config = self.resolved(config)
        start = time.perf_counter()
        read = [self.prepare(photo, method=config.method) for photo in photos]
        embeddings = self.embed_photos(read)
        evidence, joined = self._said_by_geoclip(read, config)
        if config.prior is not None:
            evidence = (*evidence, self._prior(config.prior))
        found = search(
            embeddings,
            self.source,
            self.backend,
            config,
            known=self.known,
            calibration=calibration,
            evidence=evidence,
            joined=joined,
            progress=progress,
            on_level=on_level,
        )
        seconds = (time.perf_counter() - start) / max(1, len(read))
        return [
            self._location(photo, levels, config, calibration, seconds)
            for photo, levels in zip(read, found, strict=True)
        ]

    def using(self, backend: Backend) -> GeoEngine:
        """Return an engine that differs only in its backend; closing it closes the tile source as well."""
        other = copy.copy(self)
        other.backend = backend
        return other

    def resolved(self, config: SearchConfig) -> SearchConfig:
        """Return a configuration whose score is chosen: that of the bundle where it was None.

        Fusion and priors are of the path score, and GeoCLIP alone has none.
        """
        if config.score is not None or not config.method.searches:
            return config
        calibration = self.bundle.calibration
        evidence = config.method is Method.fused or config.prior is not None
        of_path = evidence or (calibration is not None and calibration.fitted)
        return replace(config, score=Score.path if of_path else Score.paper)

    def _locate_in_gallery(self, photos: Sequence[PhotoSource], config: SearchConfig) -> list[Location]:
        """Answer with points of GeoCLIP's gallery, without a tile."""
        geoclip = self.geoclip()
        start = time.perf_counter()
        read = [self.prepare(photo, method=config.method) for photo in photos]
        embeddings = geoclip.embed(read)
        found = geoclip.best(embeddings, config.top, within=config.within, apart_km=APART_KM)
        seconds = (time.perf_counter() - start) / max(1, len(read))
        return [
            gallery_location(photo.name, matches, geoclip, config, seconds)
            for photo, matches in zip(read, found, strict=True)
        ]

    def _prior(self, spec: str) -> Density:
        """Return a prior, which is opened once; raises PriorError."""
        with self._opening:
            if spec not in self._priors:
                self._priors[spec] = open_prior(spec, self.bundle.world)
            return self._priors[spec]

    def _said_by_geoclip(
        self, photos: Sequence[Photo], config: SearchConfig
    ) -> tuple[tuple[TileEvidence, ...], list[LngLat | None] | None]:
        """Return GeoCLIP's evidence and its best points; a search's method asks for one of them or none."""
        if not config.method.asks_geoclip:
            return (), None
        geoclip = self.geoclip()
        embeddings = geoclip.embed(photos)
        if config.method is Method.fused:
            return (geoclip.evidence(embeddings),), None
        best = geoclip.best(embeddings, 1, within=config.within)
        return (), [LngLat(*matches.points[0].tolist()) for matches in best]

    def prepare(self, photo: PhotoSource, *, method: Method = Method.tiles) -> Photo:
        """Read a photo and keep only the squares that encoders see: many that wait stay small.

        They are those of the encoders that `method` asks.
        """
        whole = photo if isinstance(photo, Photo) else read_photo(photo)
        if isinstance(whole, TwoSquares):
            return whole
        size, mode = self.bundle.image_size, self.bundle.manifest.resize_mode
        if not method.asks_geoclip:
            return Photo(whole.name, to_square(whole.pixels, size, mode))
        other = self.geoclip().bundle
        square = self.geoclip().square(whole)
        if not method.searches or (other.image_size, other.manifest.resize_mode) == (size, mode):
            return Photo(whole.name, square)
        return TwoSquares(whole.name, to_square(whole.pixels, size, mode), square)

    def embed_photos(self, photos: Sequence[Photo]) -> NDArray[np.float32]:
        """Return the photo encoder's unit embeddings, float32[n, d], in the order of the photos."""
        size, mode = self.bundle.image_size, self.bundle.manifest.resize_mode
        embeddings = np.empty((len(photos), self.bundle.embed_dim), dtype=np.float32)
        for start in range(0, len(photos), _PHOTO_CHUNK):
            chunk = photos[start : start + _PHOTO_CHUNK]
            squares = np.stack([to_square(photo.pixels, size, mode) for photo in chunk])
            embeddings[start : start + len(chunk)] = self.backend.encode(PHOTO, squares)
        return embeddings

    def _check_levels(self, levels: Sequence[int]) -> None:
        if not self.bundle.levels:
            raise BundleError(no_map_encoders(self.bundle))
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
        found = answer(
            levels,
            top=config.top,
            objective=config.objective,
            sharpness=1.0 if of_path else manifest.logit_scale[encoder_name(levels[-1].zoom)],
            radius=self._fitted_radius(config, calibration, levels),
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
            attribution=self._attribution(config),
            model=self._model(config),
            seconds=seconds,
            within="" if config.within is None else config.within.name,
            left_out=tuple(sorted(set(config.levels) - set(self._levels(config)))),
            scoring=Scoring(
                method=str(config.method),
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

    def _model(self, config: SearchConfig) -> str:
        own = model_name(self.bundle.manifest)
        if not config.method.asks_geoclip:
            return own
        return f"{own} with {model_name(self.geoclip().bundle.manifest)}"

    def _attribution(self, config: SearchConfig) -> str:
        prior = "" if config.prior is None else self._prior(config.prior).attribution
        return "; ".join(filter(None, (self.source.attribution, prior)))

    def _fitted_radius(
        self, config: SearchConfig, calibration: Calibration, levels: Sequence[Level]
    ) -> RadiusFit | None:
        """Return the radius that was fitted for searches of this kind; None where there is none."""
        alone = config.quota is None and config.prior is None and config.method is Method.tiles
        if not (calibration.fitted and alone and config.within is None and config.objective == BEST_TILE):
            return None
        zooms = calibration.zooms or self.bundle.levels
        if tuple(level.zoom for level in levels) != zooms or any(level.late for level in levels):
            return None
        if any(level.exhaustive for level in levels[1:]):  # a beam loses the truth more often
            return None
        fit = calibration.fit(centred=config.centred)
        return fitted_radius(fit, config.score or Score.paper, config.k)
