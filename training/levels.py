"""The photo-tile pairs of one level, and the tiles that training them needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geoengine.engine.tiles import xy_at
from geoengine.training.errors import TrainingError
from geoengine.training.features import TileFeatures
from geoengine.training.negatives import Keys, drawn, pools, tile_keys
from geoengine.training.photos import Photos
from geoengine.training.recipe import Recipe

_AT_ONCE = 100_000  # tiles whose negatives are chosen together; bounds memory

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LevelPairs:
    """Photos of a split and their tiles at one zoom, of all photos that can be read and whose tile exists.

    `rows` int64[m] are the photos, `own` uint64[m] their tiles, `siblings` and `neighbours` uint64[m, pool]
    the tiles to tell these apart from, the own tile standing for those that do not exist. `dropped` counts
    the photos that lack a tile.
    """

    zoom: int
    rows: Int64Array
    own: Keys
    siblings: Keys
    neighbours: Keys
    dropped: int

    def __len__(self) -> int:
        return len(self.rows)

    def negatives(self, chosen: Int64Array, recipe: Recipe, epoch: int) -> Keys:
        """Return the tiles without a photo that some of the pairs bring to a step, uint64[n]."""
        parts = [
            drawn(pool[chosen], count, epoch).reshape(-1)
            for pool, count in ((self.siblings, recipe.siblings), (self.neighbours, recipe.neighbours))
            if count
        ]
        return np.concatenate([self.own[:0], *parts])


def own_tiles(zoom: int, photos: Photos) -> Keys:
    """Return the tile of each photo of a split, uint64[m]."""
    return tile_keys(xy_at(photos.lng, photos.lat, zoom))


def needed_tiles(zoom: int, own: Keys, recipe: Recipe) -> Keys:
    """Return the tiles that training on photos in the tiles `own` needs, distinct and sorted."""
    own = np.unique(own)
    parts = [own]
    for pool, count in zip(_pools(zoom, own, recipe), (recipe.siblings, recipe.neighbours), strict=True):
        if count:
            parts.append(pool.reshape(-1))
    return np.unique(np.concatenate(parts))


def make_pairs(
    zoom: int, photos: Photos, readable: npt.NDArray[np.bool_], tiles: TileFeatures, recipe: Recipe | None
) -> LevelPairs:
    """Pair a split's readable photos with the tiles that exist; without a recipe there are no negatives.

    `tiles` must know about `needed_tiles`. Raises TrainingError when fewer than two photos have a tile.
    """
    rows = np.flatnonzero(readable)
    own = own_tiles(zoom, photos)[rows]
    there = tiles.present(zoom, own)
    rows, own = rows[there], own[there]
    if len(rows) < 2:
        raise TrainingError(
            f"zoom {zoom}: only {len(rows)} of {len(there)} photos have a tile in this source, too few to "
            "train on: name another source with --tiles, or its zooms with --levels"
        )
    distinct, inverse = np.unique(own, return_inverse=True)
    pool = [own[:, None][:, :0]] * 2
    if recipe is not None:
        pool = []
        for chosen, count in zip(
            _pools(zoom, distinct, recipe), (recipe.siblings, recipe.neighbours), strict=True
        ):
            if count:
                exists = tiles.present(zoom, chosen.reshape(-1)).reshape(chosen.shape)
                chosen = np.where(exists, chosen, distinct[:, None])
            pool.append(chosen[inverse.reshape(-1)])
    return LevelPairs(
        zoom=zoom,
        rows=rows,
        own=own,
        siblings=pool[0],
        neighbours=pool[1],
        dropped=int(len(there) - there.sum()),
    )


def _pools(zoom: int, own: Keys, recipe: Recipe) -> tuple[Keys, Keys]:
    """Return the pools of distinct tiles; empty ones for a recipe without negatives."""
    if not recipe.siblings and not recipe.neighbours:
        return own[:, None][:, :0], own[:, None][:, :0]
    parts = [
        pools(zoom, own[start : start + _AT_ONCE], recipe.pool) for start in range(0, len(own), _AT_ONCE)
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
