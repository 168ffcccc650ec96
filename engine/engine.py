"""`GeoEngine`: photos in, places out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import Backend, open_backend
from geoengine.engine.bundle import EngineBundle, resolve_bundle
from geoengine.engine.errors import BundleError, SourceError, TileError
from geoengine.engine.index.known_rows import KnownRows, RowCache
from geoengine.engine.index.tile_index import Maker, TileIndex
from geoengine.engine.manifest import PHOTO, encoder_name, model_name
from geoengine.engine.photos import Photo, read_photo
from geoengine.engine.preprocess import to_square
from geoengine.engine.regions import Region, RegionError
from geoengine.engine.results import Candidate, Level, Location, ScoredTile
from geoengine.engine.search import LevelDone, Progress, SearchConfig, levels_of, search
from geoengine.engine.sources import TileSource, open_source
from geoengine.engine.tiles import Tile, center, centers, great_circle_km_array, half_diagonal_km, parent

if TYPE_CHECKING:
    from PIL.Image import Image

PhotoSource: TypeAlias = Union[Photo, str, os.PathLike[str], bytes, NDArray[np.uint8], "Image"]
"""What `locate` takes for a photo: one already read, or anything that `read_photo` reads."""

RADIUS_SHARE = 2 / 3
"""The part of the last beam's softmax share that lies within the uncertainty radius."""

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
        start = time.perf_counter()
        read = [self.prepare(photo) for photo in photos]
        embeddings = self.embed_photos(read)
        found = search(
            embeddings,
            self.source,
            self.backend,
            config,
            known=self.known,
            progress=progress,
            on_level=on_level,
        )
        seconds = (time.perf_counter() - start) / max(1, len(read))
        return [
            self._location(photo, levels, config, seconds) for photo, levels in zip(read, found, strict=True)
        ]

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
        self, photo: Photo, levels: tuple[Level, ...], config: SearchConfig, seconds: float
    ) -> Location:
        manifest = self.bundle.manifest
        last = levels[-1]
        shares = softmax_shares(last, manifest.logit_scale[encoder_name(last.zoom)])
        ranked = zip(last.beam[: config.top], shares, strict=False)
        candidates = tuple(
            Candidate(
                rank=rank,
                tile=scored.tile,
                point=center(scored.tile),
                score=scored.score,
                share=float(share),
                path=_path(scored.tile, levels),
            )
            for rank, (scored, share) in enumerate(ranked, start=1)
        )
        return Location(
            photo=photo.name,
            world=self.bundle.world,
            point=candidates[0].point,
            score=candidates[0].score,
            radius_km=uncertainty_radius_km(last, shares),
            candidates=candidates,
            levels=levels,
            k=config.k,
            tiles=self.source.name,
            attribution=self.source.attribution,
            model=model_name(manifest),
            seconds=seconds,
            within="" if config.within is None else config.within.name,
            left_out=tuple(sorted(set(config.levels) - set(self._levels(config)))),
        )


def softmax_shares(level: Level, logit_scale: float) -> NDArray[np.float64]:
    """Return the softmax of a beam's scores times the logit scale, float64[beam], in the beam's order."""
    logits = logit_scale * np.array([scored.score for scored in level.beam], dtype=np.float64)
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def uncertainty_radius_km(level: Level, shares: NDArray[np.float64]) -> float:
    """Return the radius in km around the best tile's centre within which two thirds of the beam's share lies.

    `shares` is float64[beam], summing to 1. The radius is the smallest great-circle distance from the centre
    of the first tile such that the tiles whose centres lie within it hold at least `RADIUS_SHARE` of the
    share, plus half the diagonal of the first tile. It measures how much the beam agrees with itself and is
    not calibrated: it knows nothing of places that the search has dropped.
    """
    points = centers(level.zoom, [scored.tile[1:] for scored in level.beam])  # (beam, 2)
    distances = great_circle_km_array(points[0, 0], points[0, 1], points[:, 0], points[:, 1])  # (beam,)
    nearest_first = np.argsort(distances, kind="stable")
    within = np.cumsum(shares[nearest_first])
    # The sum of shares that make up two thirds exactly may come out an ulp short.
    reached = int(np.searchsorted(within, RADIUS_SHARE - 1e-12))
    return float(distances[nearest_first[reached]]) + half_diagonal_km(level.beam[0].tile)


def _path(tile: Tile, levels: Sequence[Level]) -> tuple[ScoredTile, ...]:
    """Return the tile's scored ancestor in each level, coarse to fine, and itself."""
    path = []
    for level in levels:
        ancestor = parent(tile, level.zoom)
        path += [scored for scored in (*level.beam, *level.ancestors) if scored.tile == ancestor]
    return tuple(path)
