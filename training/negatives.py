"""Tiles that a photo must be told apart from: those with the same parent as its own, and those beside it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from geoengine.training.recipe import MAX_POOL

Int64Array = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


def tile_keys(xy: Int64Array) -> Keys:
    """Return tiles int64[..., 2] of one zoom as single numbers, uint64[...], that sort by x, then y."""
    return (xy[..., 0].astype(np.uint64) << np.uint64(32)) | xy[..., 1].astype(np.uint64)


def tiles_of_keys(keys: Keys) -> Int64Array:
    """Return the tiles, int64[..., 2], of keys, uint64[...]."""
    return np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.int64)


def family(xy: Int64Array) -> Int64Array:
    """Return the 16 tiles that have the parent of each tile, int64[n, 16, 2], x in the outer loop."""
    inner = np.stack(np.meshgrid(range(4), range(4), indexing="ij"), axis=-1).reshape(16, 2)
    return np.asarray((xy & ~np.int64(3))[:, None] + inner)


def place_in_family(xy: Int64Array) -> Int64Array:
    """Return which of its family each tile is, int64[n] in [0, 16)."""
    return np.asarray((xy[:, 0] & 3) * 4 + (xy[:, 1] & 3))


def siblings(xy: Int64Array) -> Int64Array:
    """Return the 15 other tiles that have the parent of each tile, int64[n, 15, 2]."""
    others = np.arange(16)[None] != place_in_family(xy)[:, None]
    return np.asarray(family(xy)[others].reshape(len(xy), 15, 2))


def neighbours(zoom: int, xy: Int64Array) -> Int64Array:
    """Return the 8 tiles around each tile, int64[n, 8, 2]; beyond a pole stands the tile itself."""
    steps = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)])
    side = 1 << zoom
    around = xy[:, None] + steps
    around[..., 0] %= side  # the map is round that way
    beyond = (around[..., 1] < 0) | (around[..., 1] >= side)
    return np.where(beyond[..., None], xy[:, None], around)


def pools(zoom: int, own: Keys, count: int) -> tuple[Keys, Keys]:
    """Choose the siblings and the neighbours that each tile is ever told apart from, uint64[n, count] each.

    The choice is a hash of the tile, so that it is the same in every run and for all photos of a tile;
    `count` is at most 8.
    """
    xy = tiles_of_keys(own)
    chosen = []
    for salt, tiles in enumerate((tile_keys(siblings(xy)), tile_keys(neighbours(zoom, xy)))):
        numbers = np.arange(tiles.shape[1], dtype=np.uint64)
        order = np.argsort(_mixed(own[:, None] * np.uint64(64) + numbers + np.uint64(32 * salt)), axis=1)
        chosen.append(np.take_along_axis(tiles, order[:, : min(count, MAX_POOL)], axis=1))
    return chosen[0], chosen[1]


def drawn(pool: Keys, count: int, epoch: int) -> Keys:
    """Return the `count` tiles of each pool that take part in an epoch, uint64[n, count], all in turn."""
    columns = (epoch * count + np.arange(count)) % pool.shape[1]
    return pool[:, columns]


def _mixed(numbers: Keys) -> Keys:
    """Scatter numbers: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
