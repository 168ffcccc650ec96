"""The hierarchical search, Algorithm 1 of the paper: any beam width and levels, several photos at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import EmbeddingRows
from geoengine.engine.errors import GeoEngineError, SourceError, TileError
from geoengine.engine.manifest import encoder_name
from geoengine.engine.readahead import ReadAhead
from geoengine.engine.regions import Region
from geoengine.engine.regions.box import Box, Overlap
from geoengine.engine.results import Level, ScoredTile
from geoengine.engine.sources import WORLD_BOUNDS, TileBatch, TileSource
from geoengine.engine.tiles import LEVELS, Tile, all_xy, descendants_xy, tile_count


class Encoders(Protocol):
    """The part of a backend that a search needs; see `Backend`."""

    @property
    def batch(self) -> int:
        """How many pictures in one call suit it best; bounds memory."""
        ...

    def rows(self, encoder: str, capacity: int) -> EmbeddingRows:
        """Return room for the embeddings of `capacity` pictures of one encoder."""
        ...


Progress: TypeAlias = Callable[[int, int, int, int], None]
"""(level index, zoom, tiles done, tiles in all), often; a level's last call has as many done as there are."""

READ_AHEAD = 2
"""Batches of the tile source that may wait for the encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What is searched: `k` tiles kept after each level, the levels' zooms, `top` candidates reported.

    `within` is the part of the world that is searched, None for all of it.
    """

    k: int = 16
    levels: tuple[int, ...] = LEVELS
    top: int = 5
    within: Region | None = None

    def __post_init__(self) -> None:
        for name, value in (("k", self.k), ("top", self.top)):
            if value < 1:
                raise GeoEngineError(f"{name} must be at least 1, got {value}")
        if not self.levels:
            raise TileError("levels must name at least one zoom")
        if any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise TileError(f"levels must increase strictly, got {', '.join(map(str, self.levels))}")
        for zoom in self.levels:
            tile_count(zoom)  # refuses a zoom that does not exist


def search(
    photo_embeddings: NDArray[np.float32],
    source: TileSource,
    encoders: Encoders,
    config: SearchConfig,
    *,
    progress: Progress | None = None,
) -> list[tuple[Level, ...]]:
    """Descend the tile pyramid for each photo, float32[p, d], and return the photo's levels, coarse to fine.

    A level's beam holds the k best-scoring candidates, best first, and all of them when there are fewer than
    k. Candidates are ordered by the beam they descend from, then as in `descendants_xy`; of equal scores the
    earlier candidate wins. (Line 11 of Algorithm 1 keeps fewer than k on a tie across the k-th place; here it
    is always exactly k, so the answer does not depend on batch size or backend.) Photos do not influence each
    other; tiles that several of them want are read and encoded once, and so are tiles with equal pixels.

    Only the levels that the source may have are searched, and of them only the tiles that overlap
    `config.within` and the source's bounds. Tiles that the source lacks all the same are skipped and counted
    in `Level.missing`. A photo for which a level has no tile at all ends with the level before. Raises
    SourceError when that is the first level, or when the source has none of the levels; exceptions of the
    source and of the encoders pass through, and no thread is left behind.
    """
    queries = np.ascontiguousarray(photo_embeddings, dtype=np.float32)
    found: list[list[Level]] = [[] for _ in queries]
    zooms, area = levels_of(source, config.levels), searched_area(source, config.within)
    first = all_xy(zooms[0]) if area is None else area.tiles(zooms[0])
    candidates = dict.fromkeys(range(len(queries)), first)
    for index, zoom in enumerate(zooms):
        if index > 0:
            candidates = {
                photo: _descendants(levels[-1], zoom, area)
                for photo, levels in enumerate(found)
                if len(levels) == index  # the others had no tile at an earlier level
            }
        if not candidates:
            break
        report = _level_progress(progress, index, zoom)
        tiles = _encode_level(source, encoders, zoom, candidates.values(), report)
        for photo, level in tiles.rank(candidates, queries, config.k):
            if level.beam:
                found[photo].append(level)
        if index == 0 and not any(found):
            where = "" if config.within is None else f" within {config.within.name}"
            raise SourceError(f"tile source {source.name} has no tile of zoom {zoom}, the first level{where}")
    return [tuple(levels) for levels in found]


def levels_of(source: TileSource, levels: Sequence[int]) -> list[int]:
    """Return the levels that a source may have tiles of; raises SourceError when there are none."""
    there = [zoom for zoom in levels if source.min_zoom <= zoom <= source.max_zoom]
    if not there:
        raise SourceError(
            f"tile source {source.name} has zooms {source.min_zoom} to {source.max_zoom}, "
            f"none of the levels {', '.join(map(str, levels))}"
        )
    return there


def searched_area(source: TileSource, within: Region | None) -> Region | None:
    """Return the part of the world in which both the search and the source have tiles; None for all of it."""
    if source.bounds == WORLD_BOUNDS:
        return within
    bounds = Box(source.bounds)
    return bounds if within is None else Overlap(within, bounds)


def _descendants(level: Level, zoom: int, area: Region | None) -> NDArray[np.int64]:
    """Return the tiles of a zoom, int64[n, 2], that lie in a level's beam and overlap the area."""
    xy = descendants_xy([scored.tile[1:] for scored in level.beam], level.zoom, zoom)
    return xy if area is None else xy[area.intersects(zoom, xy)]


@dataclass(frozen=True, slots=True)
class _EncodedLevel:
    """The tiles of one level: `ids` sorted, `rows` into `embeddings`, -1 for a missing tile."""

    zoom: int
    ids: NDArray[np.int64]  # (tiles,)
    rows: NDArray[np.int64]  # (tiles,)
    embeddings: EmbeddingRows

    def rank(
        self, candidates: Mapping[int, NDArray[np.int64]], queries: NDArray[np.float32], k: int
    ) -> Iterator[tuple[int, Level]]:
        """Score each photo's candidates, int64[n, 2], in one call; yields photos and their levels."""
        rows = {photo: self.rows[np.searchsorted(self.ids, _pack(xy))] for photo, xy in candidates.items()}
        present = {photo: np.flatnonzero(own >= 0) for photo, own in rows.items()}
        segments = np.cumsum([0, *(len(own) for own in present.values())])
        scores, order = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
        if segments[-1]:
            listed = np.concatenate([rows[photo][own] for photo, own in present.items()])
            scores, order = self.embeddings.top_k(queries[list(rows)], k, listed, segments)
        for row, (photo, xy) in enumerate(candidates.items()):
            best = order[row][order[row] >= 0]  # fewer than k where a photo has fewer candidates
            kept = xy[present[photo][best]]  # (k, 2)
            beam = tuple(
                ScoredTile(tile=Tile(self.zoom, x, y), score=score)
                for (x, y), score in zip(kept.tolist(), scores[row].tolist(), strict=False)
            )
            there = len(present[photo])
            yield photo, Level(zoom=self.zoom, candidates=there, missing=len(xy) - there, beam=beam)


def _encode_level(
    source: TileSource,
    encoders: Encoders,
    zoom: int,
    candidates: Iterable[NDArray[np.int64]],
    progress: Callable[[int, int], None],
) -> _EncodedLevel:
    """Read the union of all photos' candidates, each tile once, and encode each distinct picture once.

    Reading and hashing run on a thread of their own, ahead of the encoder.
    """
    arrays = {id(xy): xy for xy in candidates}.values()  # at the first level all photos share one array
    ids = np.unique(np.concatenate([_pack(xy) for xy in arrays]))
    rows = np.full(len(ids), -1, dtype=np.int64)
    embeddings = encoders.rows(encoder_name(zoom), len(ids))
    progress(0, len(ids))
    with ReadAhead(lambda: _hashed(source, source.read(zoom, _unpack(ids))), depth=READ_AHEAD) as batches:
        for pictures in _distinct(batches, rows, encoders.batch, lambda done: progress(done, len(ids))):
            embeddings.append(pictures)
    progress(len(ids), len(ids))
    return _EncodedLevel(zoom, ids, rows, embeddings)


def _hashed(source: TileSource, batches: Iterator[TileBatch]) -> Iterator[tuple[TileBatch, list[bytes]]]:
    """Add to each batch a digest of each picture's pixels, after checking what the source hands out."""
    side = 0
    for batch in batches:
        side = side or batch.pixels.shape[1]
        expected = (len(batch.positions), side, side, 3)
        if batch.pixels.shape != expected or batch.pixels.dtype != np.uint8:
            raise SourceError(
                f"tile source {source.name} gave {batch.pixels.dtype} pictures of shape {batch.pixels.shape} "
                f"instead of uint8 {expected}"
            )
        # SHA-256 is the fastest of hashlib's where the CPU has instructions for it: 20 us for 112 px.
        yield batch, [hashlib.sha256(picture).digest() for picture in np.ascontiguousarray(batch.pixels)]


def _distinct(
    batches: Iterable[tuple[TileBatch, list[bytes]]],
    rows: NDArray[np.int64],
    chunk: int,
    progress: Callable[[int], None],
) -> Iterator[NDArray[np.uint8]]:
    """Yield the distinct pictures, `chunk` at a time, and write into `rows` which picture each tile has.

    The chunks are views of one staging buffer.
    """
    row_of: dict[bytes, int] = {}
    staging = np.empty((0, 0, 0, 3), dtype=np.uint8)
    waiting = done = 0
    for batch, digests in batches:
        if not staging.size:
            staging = np.empty((min(chunk, len(rows)), *batch.pixels.shape[1:]), dtype=np.uint8)
        for position, digest, picture in zip(batch.positions.tolist(), digests, batch.pixels, strict=True):
            if digest not in row_of:
                row_of[digest] = len(row_of)
                staging[waiting] = picture
                waiting += 1
                if waiting == len(staging):
                    yield staging
                    waiting = 0
            rows[position] = row_of[digest]
        done += len(digests)
        progress(done)
    if waiting:
        yield staging[:waiting]


def _level_progress(progress: Progress | None, index: int, zoom: int) -> Callable[[int, int], None]:
    return lambda done, total: None if progress is None else progress(index, zoom, done, total)


def _pack(xy: NDArray[np.int64]) -> NDArray[np.int64]:
    """One sortable number for each tile of a level."""
    return xy[:, 0] << 32 | xy[:, 1]


def _unpack(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.stack([ids >> 32, ids & 0xFFFFFFFF], axis=1)
