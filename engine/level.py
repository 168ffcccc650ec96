"""The tiles of one level of a search: embeddings that are known, or read and encoded, and their ranking."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import EmbeddingRows
from geoengine.engine.index.known_rows import KnownRows
from geoengine.engine.index.segments import HalfRows, Ids, tile_ids, tiles_of_ids
from geoengine.engine.index.tile_index import Table
from geoengine.engine.manifest import encoder_name
from geoengine.engine.pictures import hand_on
from geoengine.engine.results import Level, ScoredTile
from geoengine.engine.scoring.path import centred_cosines
from geoengine.engine.sources import TileSource
from geoengine.engine.tiles import Tile
from geoengine.kernels import cosine_topk


class Encoders(Protocol):
    """The part of a backend that a search needs; see `Backend`."""

    @property
    def batch(self) -> int:
        """How many pictures in one call suit it best; bounds memory."""
        ...

    def encode(self, encoder: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the unit embeddings, float32[n, d], of uint8[n, S, S, 3] pictures."""
        ...

    def rows(self, encoder: str, capacity: int) -> EmbeddingRows:
        """Return room for the embeddings of `capacity` pictures of one encoder."""
        ...


class _Scored(Protocol):
    """The part of `EmbeddingRows` that ranks."""

    def top_k(
        self, queries: NDArray[np.float32], k: int, rows: NDArray[np.int64], segments: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]: ...


class _HalfRows:
    """Embeddings in half precision, as indexes store them: known ones and new ones score alike."""

    def __init__(self, rows: HalfRows) -> None:
        self._rows = rows

    def top_k(
        self, queries: NDArray[np.float32], k: int, rows: NDArray[np.int64], segments: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return cosine_topk(self._rows, queries, k, rows=rows, segments=segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How a level's tiles are read: from where, until when, and what is done where there are none.

    `deadline_s` is counted from the start of a level, None for no limit; `progress` hears of tiles done and
    tiles in all.
    """

    source: TileSource
    encoders: Encoders
    deadline_s: float | None
    overzoom: bool
    progress: Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LevelTiles:
    """The tiles of one level, of which photos want some.

    `ids` are sorted; `rows` are their rows in `embeddings`, -1 for a tile without one. `known` are those
    whose embeddings were known before, `enlarged` those that were cut out of coarser tiles. With `late`, the
    time was up before all had arrived.
    """

    zoom: int
    ids: NDArray[np.int64]  # (tiles,)
    rows: NDArray[np.int64]  # (tiles,)
    known: NDArray[np.bool_]  # (tiles,)
    enlarged: NDArray[np.bool_]  # (tiles,)
    late: bool
    embeddings: _Scored

    def rank(
        self, candidates: Mapping[int, NDArray[np.int64]], queries: NDArray[np.float32], k: int
    ) -> Iterator[tuple[int, Level]]:
        """Score each photo's candidates, int64[n, 2], in one call; yields photos and their levels."""
        for photo, present, best, scores in self._top_k(candidates, queries, k):
            xy = candidates[photo]
            yield photo, self.level(xy, present, beam(self.zoom, xy[present[best]], scores))

    def cosines(
        self,
        candidates: Mapping[int, NDArray[np.int64]],
        queries: NDArray[np.float32],
        mean: NDArray[np.float32] | None = None,
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
        """Yield for each photo which of its candidates are there, int64[n], and their cosines, float32[n].

        Both are in the order of the candidates. `mean`, float32[d], is subtracted from the embeddings first.
        """
        to_mean = None if mean is None else self._products(mean)
        everything = max((len(xy) for xy in candidates.values()), default=0)
        for photo, present, order, ranked in self._top_k(candidates, queries, max(1, everything)):
            cosines = np.empty(len(present), dtype=np.float32)
            cosines[order] = ranked
            if mean is not None and to_mean is not None:
                rows = self.rows[np.searchsorted(self.ids, _pack(candidates[photo][present]))]
                cosines = centred_cosines(cosines, queries[photo], to_mean[rows], mean)
            yield photo, present, cosines

    def level(self, xy: NDArray[np.int64], present: NDArray[np.int64], kept: tuple[ScoredTile, ...]) -> Level:
        """Return the level of a photo with candidates int64[n, 2], those `present`, and the tiles kept."""
        there = np.searchsorted(self.ids, _pack(xy[present]))
        absent = len(xy) - len(there)
        return Level(
            zoom=self.zoom,
            candidates=len(there),
            missing=0 if self.late else absent,
            late=absent if self.late else 0,
            known=int(self.known[there].sum()),
            enlarged=int(self.enlarged[there].sum()),
            beam=kept,
        )

    def _top_k(
        self, candidates: Mapping[int, NDArray[np.int64]], queries: NDArray[np.float32], k: int
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
        """Yield each photo, its candidates that are there, the best of those in order, and their cosines."""
        places = {photo: np.searchsorted(self.ids, _pack(xy)) for photo, xy in candidates.items()}
        present = {photo: np.flatnonzero(self.rows[own] >= 0) for photo, own in places.items()}
        segments = np.cumsum([0, *(len(own) for own in present.values())])
        scores, order = np.empty((len(places), 0), np.float32), np.empty((len(places), 0), np.int64)
        if segments[-1]:
            listed = np.concatenate([self.rows[places[photo][own]] for photo, own in present.items()])
            scores, order = self.embeddings.top_k(queries[list(places)], k, listed, segments)
        for row, photo in enumerate(candidates):
            there = order[row] >= 0  # fewer than k where a photo has fewer candidates
            yield photo, present[photo], order[row][there], scores[row][there]

    def _products(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the products of all embeddings with a vector, float32[rows]."""
        rows = np.unique(self.rows[self.rows >= 0])
        products = np.zeros(int(rows[-1]) + 1 if len(rows) else 0, dtype=np.float32)
        if len(rows):
            segments = np.array([0, len(rows)])
            cosines, order = self.embeddings.top_k(vector[None], len(rows), rows, segments)
            products[rows[order[0]]] = cosines[0] * np.linalg.norm(vector)
        return products


def embed_level(
    reading: Reading, known: KnownRows | None, zoom: int, candidates: Iterable[NDArray[np.int64]]
) -> LevelTiles:
    """Return the union of all photos' candidates: each tile is read once, each distinct picture encoded once.

    Tiles whose embeddings are known are not read.
    """
    arrays = {id(xy): xy for xy in candidates}.values()  # at the first level all photos share one array
    ids = np.unique(np.concatenate([_pack(xy) for xy in arrays]))
    xy = np.stack([ids >> 32, ids & 0xFFFFFFFF], axis=1)
    if known is not None:
        return _embed_unknown(reading, known, zoom, ids, xy)
    embeddings = reading.encoders.rows(encoder_name(zoom), len(ids))
    reading.progress(0, len(ids))
    arrived = hand_on(
        reading.source,
        zoom,
        xy,
        embeddings.append,
        batch=reading.encoders.batch,
        progress=lambda done: reading.progress(done, len(ids)),
        until=_until(reading),
        overzoom=reading.overzoom,
    )
    reading.progress(len(ids), len(ids))
    nothing = np.zeros(len(ids), dtype=bool)
    return LevelTiles(zoom, ids, arrived.rows, nothing, arrived.enlarged, arrived.late, embeddings)


def _embed_unknown(
    reading: Reading, known: KnownRows, zoom: int, ids: NDArray[np.int64], xy: NDArray[np.int64]
) -> LevelTiles:
    """Look tiles up, and read and encode those that are not known."""
    index_ids = tile_ids(xy)
    table, found, absent = known.look_up(zoom, index_ids)
    wanted = np.flatnonzero(~found & ~absent)
    before = len(ids) - len(wanted)
    enlarged, late = np.zeros(len(ids), dtype=bool), False
    present = found.copy()
    reading.progress(before, len(ids))
    if len(wanted):
        embeddings = reading.encoders.rows(encoder_name(zoom), len(wanted))
        arrived = hand_on(
            reading.source,
            zoom,
            xy[wanted],
            embeddings.append,
            batch=reading.encoders.batch,
            progress=lambda done: reading.progress(before + done, len(ids)),
            until=_until(reading),
            overzoom=reading.overzoom,
        )
        there, late = arrived.rows >= 0, arrived.late
        new = wanted[there]
        if len(new):
            table[new] = embeddings.download()[arrived.rows[there]]
        present[new], enlarged[wanted] = True, arrived.enlarged
        # An enlarged tile is not what the source says of that place: a later search may want it missing.
        own = new[~arrived.enlarged[there]]
        own = own[np.argsort(index_ids[own])]
        known.keep(zoom, index_ids[own], table[own])
    reading.progress(len(ids), len(ids))
    rows = np.where(present, np.arange(len(ids)), -1)
    return LevelTiles(zoom, ids, rows, found, enlarged, late, _HalfRows(table))


def rank_table(table: Table, zoom: int, queries: NDArray[np.float32], k: int) -> Iterator[tuple[int, Level]]:
    """Score all tiles of a table for each photo, float32[p, d]; yields the photos' rows and their levels.

    Candidates are ordered as in the index.
    """
    scores, order = cosine_topk(table.matrix, queries, k, rows=table.rows)
    count = len(table.ids if table.rows is None else table.rows)
    for row in range(len(queries)):
        best = order[row] if table.rows is None else table.rows[order[row]]
        yield (
            row,
            Level(
                zoom=zoom,
                candidates=count,
                missing=table.missing,
                known=count,
                exhaustive=True,
                beam=beam(zoom, tiles_of_ids(table.ids[best]), scores[row]),
            ),
        )


def table_ids(table: Table) -> Ids:
    """Return the tiles of a table, in the order of the index."""
    return table.ids if table.rows is None else table.ids[table.rows]


def table_cosines(
    table: Table, query: NDArray[np.float32], mean: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return the cosines of a query, float32[d], with all tiles of a table, float32[n], in their order.

    `mean`, float32[d], is subtracted from the embeddings first.
    """
    cosines = _all_cosines(table, query)
    if mean is None:
        return cosines
    to_mean = _all_cosines(table, mean) * np.linalg.norm(mean)
    return centred_cosines(cosines, query, to_mean, mean)


def _all_cosines(table: Table, query: NDArray[np.float32]) -> NDArray[np.float32]:
    count = len(table_ids(table))
    scores, order = cosine_topk(table.matrix, query[None], count, rows=table.rows)
    cosines = np.empty(count, dtype=np.float32)
    cosines[order[0]] = scores[0]
    return cosines


def _until(reading: Reading) -> float | None:
    return None if reading.deadline_s is None else time.monotonic() + reading.deadline_s


def beam(zoom: int, xy: NDArray[np.int64], scores: NDArray[np.floating]) -> tuple[ScoredTile, ...]:
    """Return ranked tiles, int64[n, 2], with their scores."""
    return tuple(
        ScoredTile(tile=Tile(zoom, x, y), score=score)
        for (x, y), score in zip(xy.tolist(), scores.tolist(), strict=True)
    )


def _pack(xy: NDArray[np.int64]) -> NDArray[np.int64]:
    """One sortable number for each tile of a level."""
    return xy[:, 0] << 32 | xy[:, 1]
