"""From the tiles of a level to each photo's beam, by the rules of a search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.calibration import NOT_CENTRED, Calibration, Fit
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.index.segments import find, tile_ids, tiles_of_ids
from geoengine.engine.index.tile_index import Table
from geoengine.engine.level import LevelTiles, beam, rank_table, table_cosines, table_ids
from geoengine.engine.results import Level, ScoredTile
from geoengine.engine.scoring.evidence import TileEvidence
from geoengine.engine.scoring.kinds import Score
from geoengine.engine.scoring.path import Scored, path_scores
from geoengine.engine.scoring.selection import select
from geoengine.engine.tiles import LngLat, xy_at
from geoengine.kernels import cosine_topk

Observer = Callable[[Scored], None]
"""Called with each photo's candidates of each level and all that their scores are made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How tiles are scored and which stay: `k` of them, at most `quota` of one parent while others are there.

    `calibration` is for the path score and for `centred` cosines; `evidence` enters the path score alone.
    `joined` has a point for each photo, or None: its tile stays at every level, besides the k.
    """

    k: int
    score: Score = Score.paper
    quota: int | None = None
    centred: bool = False
    calibration: Calibration | None = None
    evidence: tuple[TileEvidence, ...] = ()
    joined: Sequence[LngLat | None] | None = None
    observe: Observer | None = None

    def __post_init__(self) -> None:
        if self.evidence and self.score is not Score.path:
            raise GeoEngineError("evidence besides the tiles enters the path score only: use --score path")
        if self.score is Score.path and self.calibration is None:
            raise GeoEngineError("the path score needs a calibration, or `Calibration.assumed`")
        if self.centred and (self.calibration is None or not self.calibration.means):
            raise GeoEngineError(NOT_CENTRED)

    @property
    def by_cosine_alone(self) -> bool:
        """Whether the k largest cosines are all that is needed."""
        return (
            self.score is Score.paper
            and self.quota is None
            and not self.centred
            and self.joined is None
            and self.observe is None
        )

    @property
    def fit(self) -> Fit | None:
        """The fit of these rules' cosines; None for the paper's score."""
        if self.score is not Score.path or self.calibration is None:
            return None
        return self.calibration.fit(centred=self.centred, evidence=[source.name for source in self.evidence])

    def mean(self, zoom: int) -> NDArray[np.float32] | None:
        """Return the mean embedding that is subtracted at a zoom, if any; raises GeoEngineError."""
        if not self.centred or self.calibration is None:
            return None
        return self.calibration.mean(zoom)


@dataclass(slots=True)
class Ranking:
    """Ranks the levels of one search, coarse to fine, for photos whose embeddings are float32[p, d]."""

    rules: Rules
    queries: NDArray[np.float32]
    _whole: dict[int, _Whole] = field(default_factory=dict, init=False)

    def table(self, table: Table, zoom: int, photos: Sequence[int]) -> Iterator[tuple[int, Level]]:
        """Rank all tiles of a table for photos; yields photos and their levels.

        Candidates are ordered as in the index.
        """
        rules = self.rules
        if rules.by_cosine_alone:
            for row, level in rank_table(table, zoom, self.queries[list(photos)], rules.k):
                yield photos[row], level
            return
        ids = table_ids(table)
        xy = tiles_of_ids(ids)
        last = max(self._whole, default=None)
        parents = None if last is None else find(self._whole[last].ids, ids >> np.uint64(2 * (zoom - last)))
        above = np.zeros(len(xy), dtype=np.int64) if parents is None else parents + 1
        whole = self._whole[zoom] = _Whole(ids)
        for photo in photos:
            cosines = table_cosines(table, self.queries[photo], rules.mean(zoom))
            scored = self._scored(photo, zoom, xy, above, cosines, whole=True)
            before = 0.0 if last is None or parents is None else self._whole[last].at(photo, parents)
            scores = whole.scores[photo] = self._scores(scored, before).astype(np.float32)
            kept = select(
                scores,
                rules.k,
                groups=None if parents is None else above,
                quota=rules.quota,
                joined=self._joined(photo, zoom, xy),
            )
            yield (
                photo,
                Level(
                    zoom=zoom,
                    candidates=len(xy),
                    missing=table.missing,
                    known=len(xy),
                    exhaustive=True,
                    beam=beam(zoom, xy[kept], scores[kept]),
                ),
            )

    def tiles(
        self,
        tiles: LevelTiles,
        candidates: Mapping[int, NDArray[np.int64]],
        beams: Mapping[int, Sequence[ScoredTile]],
    ) -> Iterator[tuple[int, Level]]:
        """Rank each photo's candidates, int64[n, 2], which lie in its beam before, if there is one.

        Yields photos and their levels.
        """
        rules = self.rules
        if rules.by_cosine_alone:
            yield from tiles.rank(candidates, self.queries, rules.k)
            return
        zoom = tiles.zoom
        for photo, present, cosines in tiles.cosines(candidates, self.queries, rules.mean(zoom)):
            xy, last = candidates[photo][present], beams.get(photo, ())
            groups = _places_in(last, zoom, xy)
            scored = self._scored(photo, zoom, xy, groups, cosines, whole=not last)
            before = np.array([step.score for step in last])[groups] if last else 0.0
            scores = self._scores(scored, before)
            kept = select(
                scores,
                rules.k,
                groups=groups if last else None,
                quota=rules.quota,
                joined=self._joined(photo, zoom, xy),
            )
            yield photo, tiles.level(candidates[photo], present, beam(zoom, xy[kept], scores[kept]))

    def in_table(self, table: Table, zoom: int, photo: int, xy: NDArray[np.int64]) -> tuple[ScoredTile, ...]:
        """Return the tiles, int64[n, 2], that a ranked table has, with a photo's scores, best first."""
        rows = find(table.ids, tile_ids(xy))
        rows = rows[rows >= 0]
        if zoom in self._whole:
            whole = self._whole[zoom]
            scores = whole.scores[photo][find(whole.ids, table.ids[rows])]
            order = np.argsort(-scores, kind="stable")
            scores = scores[order]
        else:
            query = self.queries[photo][None]
            cosines, places = cosine_topk(table.matrix, query, max(1, len(rows)), rows=rows)
            scores, order = cosines[0], places[0]
        return beam(zoom, tiles_of_ids(table.ids[rows[order]]), scores)

    def _scored(
        self,
        photo: int,
        zoom: int,
        xy: NDArray[np.int64],
        parents: NDArray[np.int64],
        cosines: NDArray[np.float32],
        *,
        whole: bool,
    ) -> Scored:
        evidence = {
            source.name: source.log_probability(np.array([photo]), zoom, xy)[0]
            for source in self.rules.evidence
            if self.rules.observe is not None or self._weight(source, zoom) != 0
        }
        scored = Scored(
            photo=photo,
            zoom=zoom,
            xy=xy,
            parents=parents,
            whole=whole,
            cosines=cosines,
            evidence=evidence,
        )
        if self.rules.observe is not None:
            self.rules.observe(scored)
        return scored

    def _scores(self, scored: Scored, before: NDArray[np.float64] | float) -> NDArray[np.floating]:
        fit = self.rules.fit
        if fit is None:
            return scored.cosines
        weights = {source.name: self._weight(source, scored.zoom) for source in self.rules.evidence}
        return path_scores(scored, before, fit.level(scored.zoom), weights)

    def _weight(self, source: TileEvidence, zoom: int) -> float:
        fit = self.rules.fit
        fitted = None if fit is None else fit.level(zoom).evidence.get(source.name)
        return source.weight(zoom) if fitted is None else fitted

    def _joined(self, photo: int, zoom: int, xy: NDArray[np.int64]) -> int | None:
        """Return the place among the candidates of the tile that joins a photo's beam, if it is there."""
        point = None if self.rules.joined is None else self.rules.joined[photo]
        if point is None:
            return None
        at = np.flatnonzero((xy == xy_at(point.lng, point.lat, zoom)[0]).all(axis=1))
        return int(at[0]) if len(at) else None


@dataclass(slots=True)
class _Whole:
    """Each photo's scores of all tiles of a zoom, in the order of the sorted `ids`."""

    ids: NDArray[np.uint64]
    scores: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def at(self, photo: int, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the scores at places, float64[n]; for place -1, a missing tile, the mean of all."""
        scores = self.scores[photo]
        return np.where(places < 0, scores.mean(dtype=np.float64), scores[places])


def _places_in(last: Sequence[ScoredTile], zoom: int, xy: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where in a beam each tile's ancestor stands, int64[n]; 0 for all without a beam."""
    if not last:
        return np.zeros(len(xy), dtype=np.int64)
    above = np.array([step.tile[1:] for step in last], dtype=np.int64)
    ids = tile_ids(above)
    order = np.argsort(ids)
    shift = zoom - last[0].tile.z
    return order[np.searchsorted(ids[order], tile_ids(xy >> shift))]
