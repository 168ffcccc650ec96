"""The hierarchical search, Algorithm 1 of the paper: any beam width and levels, several photos at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.calibration import Calibration
from geoengine.engine.errors import GeoEngineError, SourceError, TileError
from geoengine.engine.index.known_rows import KnownRows
from geoengine.engine.index.tile_index import Table
from geoengine.engine.level import Encoders, Reading, embed_level
from geoengine.engine.pictures import MOST_ENLARGED
from geoengine.engine.regions import Region
from geoengine.engine.regions.box import searched_area
from geoengine.engine.results import Level, ScoredTile
from geoengine.engine.scoring.evidence import TileEvidence
from geoengine.engine.scoring.kinds import BEST_TILE, Method, Objective, Score
from geoengine.engine.scoring.ranking import Observer, Ranking, Rules
from geoengine.engine.sources import TileSource
from geoengine.engine.tiles import LEVELS, LngLat, Tile, all_xy, descendants_xy, parent, tile_count

Progress: TypeAlias = Callable[[int, int, int, int], None]
"""(level index, zoom, tiles done, tiles in all), often; a level's last call has as many done as there are."""

LevelDone: TypeAlias = Callable[[int, Level], None]
"""(photo's row, its level), as soon as a level is ranked; levels without a tile are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What is searched: `k` tiles kept after each level, the levels' zooms, `top` candidates reported.

    `within` is the part of the world that is searched, None for all of it. `deadline_s` is the time in
    seconds after which a level is scored with the tiles that have arrived, None for no limit. With
    `overzoom`, tiles that the source lacks are cut out of tiles up to three zooms coarser, and enlarged.

    `score` ranks the tiles, None for the bundle's best: `Score.path` if it is calibrated. A beam has at most
    `quota` children of one parent, None for any number, while there are others. With `centred`, the mean
    embedding of a level's tiles is subtracted from each before it is scored. `objective` is what the answer
    is to be, and `prior` names how likely photos are to be taken anywhere, None for everywhere alike.
    `method` says whether GeoCLIP is asked besides the tiles, or in place of them; then of all this only
    `top` and `within` count, and the deepest level, whose tiles are named.
    """

    k: int = 16
    levels: tuple[int, ...] = LEVELS
    top: int = 5
    within: Region | None = None
    deadline_s: float | None = None
    overzoom: bool = False
    score: Score | None = None
    quota: int | None = None
    centred: bool = False
    objective: Objective = BEST_TILE
    prior: str | None = None
    method: Method = Method.tiles

    def __post_init__(self) -> None:
        for name, value in (("k", self.k), ("top", self.top)):
            if value < 1:
                raise GeoEngineError(f"{name} must be at least 1, got {value}")
        if self.prior is not None and not self.method.searches:
            raise GeoEngineError(f"a prior is of tiles, and --method {self.method} has none: leave it out")
        if self.quota is not None and self.quota < 1:
            raise GeoEngineError(f"the quota must be at least 1, got {self.quota}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise GeoEngineError(f"the deadline must be more than 0 seconds, got {self.deadline_s:g}")
        self._check_method()
        if not self.levels:
            raise TileError("levels must name at least one zoom")
        if any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise TileError(f"levels must increase strictly, got {', '.join(map(str, self.levels))}")
        for zoom in self.levels:
            tile_count(zoom)  # refuses a zoom that does not exist

    def _check_method(self) -> None:
        if self.method is Method.fused and self.score is Score.paper:
            raise GeoEngineError("method fused adds up evidence in the path score: leave out the score paper")
        of_tiles = {
            "a score": self.score is not None,
            "a quota": self.quota is not None,
            "centring": self.centred,
            "an objective": self.objective != BEST_TILE,
        }
        if not self.method.searches and any(of_tiles.values()):
            given = ", ".join(name for name, chosen in of_tiles.items() if chosen)
            raise GeoEngineError(
                f"method geoclip searches no tiles, which is what {given} is for: leave it out"
            )


def search(
    photo_embeddings: NDArray[np.float32],
    source: TileSource,
    encoders: Encoders,
    config: SearchConfig,
    *,
    known: KnownRows | None = None,
    calibration: Calibration | None = None,
    evidence: Sequence[TileEvidence] = (),
    joined: Sequence[LngLat | None] | None = None,
    progress: Progress | None = None,
    on_level: LevelDone | None = None,
    observe: Observer | None = None,
) -> list[tuple[Level, ...]]:
    """Descend the tile pyramid for each photo, float32[p, d], and return the photo's levels, coarse to fine.

    A level's beam holds the k best-scoring candidates, best first, and all of them when there are fewer than
    k. Candidates are ordered by the beam they descend from, then as in `descendants_xy`; of equal scores the
    earlier candidate wins. (Line 11 of Algorithm 1 keeps fewer than k on a tie across the k-th place; here it
    is always exactly k, so the answer does not depend on batch size or backend.) Photos do not influence each
    other; tiles that several of them want are read and encoded once, and so are tiles with equal pixels.

    What a score is, `config.score` says: the cosine (`Score.paper`, and None), or the path score, which needs
    a `calibration`: see `path_scores`. Its softmax is over all tiles of a level that is scored whole, and
    over the tiles below one tile of the beam elsewhere. `evidence` enters it besides the tiles. Of photo i,
    the tile that holds the point `joined[i]` stays at every level, besides the k best. `observe` is called
    with all that each score is made of.

    Only the levels that the source may have are searched, and of them only the tiles that overlap
    `config.within` and the source's bounds. Tiles that the source lacks all the same are skipped and counted
    in `Level.missing`, those that come too late in `Level.late`. A photo for which a level has no tile at all
    ends with the level before.

    Of the levels that `known` has an index of, all tiles are candidates, in the order of the index; levels
    without an index are searched only below the deepest of them. Tiles whose embeddings are known are not
    read, and those of the others are added to what is known. With `known`, all embeddings are scored in half
    precision, so that the second search of a place answers as the first one did.

    Raises SourceError when the first level has no tile, or the source none of the levels, and GeoEngineError
    for a score or centring that the calibration does not allow; exceptions of the source and of the encoders
    pass through, and no thread is left behind but one that waits for a late tile.
    """
    queries = np.ascontiguousarray(photo_embeddings, dtype=np.float32)
    found: list[list[Level]] = [[] for _ in queries]
    zooms = levels_of(source, config.levels, overzoom=config.overzoom)
    area = searched_area(source, config.within)
    tables = _tables(known, zooms, None if config.within is None else area)
    zooms = [zoom for zoom in zooms if zoom in tables or zoom > max(tables, default=-1)]
    rules = Rules(
        k=config.k,
        score=config.score or Score.paper,
        quota=config.quota,
        centred=config.centred,
        calibration=calibration,
        evidence=tuple(evidence),
        joined=joined,
        observe=observe,
    )
    ranking = Ranking(rules, queries)
    for index, zoom in enumerate(zooms):
        # The others had no tile at an earlier level.
        photos = [photo for photo, levels in enumerate(found) if len(levels) == index]
        if not photos:
            break
        reading = _reading(source, encoders, config, _level_progress(progress, index, zoom))
        if zoom in tables:
            ranked = ranking.table(tables[zoom], zoom, photos)
            reading.progress(1, 1)
        else:
            candidates = _candidates(found, photos, zoom, area)
            tiles = embed_level(reading, known, zoom, candidates.values())
            beams = {photo: found[photo][-1].beam for photo in photos if found[photo]}
            ranked = ranking.tiles(tiles, candidates, beams)
        for photo, level in ranked:
            if level.beam:
                found[photo].append(level)
                if on_level is not None:
                    on_level(photo, level)
        if index == 0 and not any(found):
            raise SourceError(_nothing_found(source, zoom, config))
    return [_with_ancestors(levels, tables, ranking, photo, config.top) for photo, levels in enumerate(found)]


def _reading(
    source: TileSource, encoders: Encoders, config: SearchConfig, progress: Callable[[int, int], None]
) -> Reading:
    return Reading(
        source=source,
        encoders=encoders,
        deadline_s=config.deadline_s,
        overzoom=config.overzoom,
        progress=progress,
    )


def levels_of(source: TileSource, levels: Sequence[int], *, overzoom: bool = False) -> list[int]:
    """Return the levels that a source may have tiles of; raises SourceError when there are none.

    With `overzoom`, these are also those that can be cut out of its deepest tiles.
    """
    deepest = source.max_zoom + (MOST_ENLARGED if overzoom else 0)
    there = [zoom for zoom in levels if source.min_zoom <= zoom <= deepest]
    if not there:
        raise SourceError(
            f"tile source {source.name} has zooms {source.min_zoom} to {source.max_zoom}, "
            f"none of the levels {', '.join(map(str, levels))}"
        )
    return there


def _tables(known: KnownRows | None, zooms: Sequence[int], area: Region | None) -> dict[int, Table]:
    """Return the embeddings of the levels of which all tiles are known."""
    if known is None:
        return {}
    known.refresh()
    tables = {zoom: known.table(zoom, area) for zoom in zooms}
    return {zoom: table for zoom, table in tables.items() if table is not None}


def _candidates(
    found: Sequence[Sequence[Level]], photos: Sequence[int], zoom: int, area: Region | None
) -> Mapping[int, NDArray[np.int64]]:
    """Return each photo's tiles of a level, int64[n, 2]: those in its last beam, at first all of the area."""
    if not found[photos[0]]:
        return dict.fromkeys(photos, all_xy(zoom) if area is None else area.tiles(zoom))
    candidates = {}
    for photo in photos:
        last = found[photo][-1]
        xy = descendants_xy([scored.tile[1:] for scored in last.beam], last.zoom, zoom)
        candidates[photo] = xy if area is None else xy[area.intersects(zoom, xy)]
    return candidates


def _with_ancestors(
    levels: Sequence[Level], tables: Mapping[int, Table], ranking: Ranking, photo: int, top: int
) -> tuple[Level, ...]:
    """Add to exhaustive levels the scores of the answers' ancestors, which their beams may lack."""
    answers = [scored.tile for scored in levels[-1].beam[:top]] if levels else []
    return tuple(
        replace(level, ancestors=_ancestors(level, answers, tables[level.zoom], ranking, photo))
        if level.exhaustive
        else level
        for level in levels
    )


def _ancestors(
    level: Level, answers: Sequence[Tile], table: Table, ranking: Ranking, photo: int
) -> tuple[ScoredTile, ...]:
    kept = {scored.tile for scored in level.beam}
    lacking = sorted({parent(tile, level.zoom) for tile in answers} - kept)
    if not lacking:
        return ()
    xy = np.array([tile[1:] for tile in lacking], dtype=np.int64)
    return ranking.in_table(table, level.zoom, photo, xy)


def _nothing_found(source: TileSource, zoom: int, config: SearchConfig) -> str:
    where = "" if config.within is None else f" within {config.within.name}"
    when = "" if config.deadline_s is None else f", or none that came within {config.deadline_s:g} s"
    return f"tile source {source.name} has no tile of zoom {zoom}, the first level{where}{when}"


def _level_progress(progress: Progress | None, index: int, zoom: int) -> Callable[[int, int], None]:
    return lambda done, total: None if progress is None else progress(index, zoom, done, total)
