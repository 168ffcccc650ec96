"""Places, photos and tiles of the built-in planet to train on, rendered in parallel from a seed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from geoengine.engine.sources.planet import TILE_SIZE, default_world
from geoengine.engine.sources.planet.maps import render_cells
from geoengine.engine.sources.planet.photos import render_photo, unseen_hues
from geoengine.engine.sources.planet.world import ATTRIBUTE_LEVELS, World

PHOTO_HEIGHT = 224  # pixels; halved to the encoders' 112, where a user's photo of any size ends up too
HARMONICS = 2
CODE_SIZE = len(ATTRIBUTE_LEVELS) * 2 * 2 * HARMONICS + 1
_SECOND_HARMONIC = 0.7
_CELLS = 1 << 16

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Rendered pictures uint8[n, 112, 112, 3] and their captions float32[n, CODE_SIZE]."""

    pixels: UInt8Array
    captions: Float32Array


def land_places(rng: np.random.Generator, count: int) -> Int64Array:
    """Draw level-16 cells on land, uniform over the map, int64[count, 2]."""
    kept: list[Int64Array] = []
    while sum(map(len, kept)) < count:
        xy = rng.integers(0, _CELLS, (count, 2))
        centre = (xy + 0.5) / _CELLS
        kept.append(xy[default_world().is_land(centre[:, 0], centre[:, 1])])
    return np.concatenate(kept)[:count]


def clustered_places(rng: np.random.Generator, count: int, size: int = 16) -> Int64Array:
    """Draw level-16 cells in clusters of `size` that share a tile of a random level, int64[count, 2].

    Members of a cluster are siblings and cousins at every level below, which the search must tell apart.
    """
    centres = land_places(rng, -(-count // size))
    level = rng.integers(2, 15, len(centres))  # up to four cells of level 16 across
    spread = (_CELLS >> level)[:, None, None]
    corner = centres[:, None] // spread * spread
    members = corner + (rng.random((len(centres), 4 * size, 2)) * spread).astype(np.int64)
    chosen = []
    for candidates in members:
        middle = (candidates + 0.5) / _CELLS
        chosen.append(candidates[default_world().is_land(middle[:, 0], middle[:, 1])][:size])
    xy = np.concatenate(chosen)
    return np.concatenate([xy, land_places(rng, count)])[:count]


def photo_captions(xy: Int64Array, missing: Iterable[str | None]) -> Float32Array:
    """Return what photos of level-16 cells show, float32[n, CODE_SIZE]: every hue, 0 where it is unseen."""
    hues = default_world().ancestor_hues(16, xy)  # (n, 8, 2)
    seen = np.ones(hues.shape, dtype=np.float32)
    for i, thing in enumerate(missing):
        for level, hue in unseen_hues(thing):
            seen[i, ATTRIBUTE_LEVELS.index(level), hue] = 0
    return _code(hues, seen, np.ones(len(xy), dtype=np.float32))


def tile_captions(level: int, xy: Int64Array, land: npt.NDArray[np.bool_]) -> Float32Array:
    """Return what tiles show, float32[n, CODE_SIZE]: the hues of the place, then of its parent, and so on.

    Captions count levels from the tile upwards, because the legend does: one trunk reads all zooms. Each map
    encoder learns later which level that is. A tile without land shows none.
    """
    hues = default_world().ancestor_hues(level, xy)[:, ::-1]
    padded = np.zeros((len(xy), len(ATTRIBUTE_LEVELS), 2), dtype=np.float32)
    padded[:, : hues.shape[1]] = hues
    seen = np.zeros_like(padded)
    seen[:, : hues.shape[1]] = land[:, None, None]
    return _code(padded, seen, np.where(land, 1, -1).astype(np.float32))


def _code(hues: Float32Array, seen: Float32Array, land: Float32Array) -> Float32Array:
    angle = 2 * np.pi * hues
    waves = [np.cos(angle), np.sin(angle)]
    waves += [_SECOND_HARMONIC * np.cos(2 * angle), _SECOND_HARMONIC * np.sin(2 * angle)]
    code = (np.stack(waves, axis=-1) * seen[..., None]).reshape(len(hues), -1)
    return np.concatenate([code, land[:, None]], axis=1).astype(np.float32)


def render_photos(xy: Int64Array, seeds: Int64Array, workers: int) -> Pictures:
    """Photograph level-16 cells, int64[n, 2]; equal `seeds`, int64[n], of one place give equal photos."""
    tasks = [(part, seeds[start : start + len(part)]) for start, part in _parts(xy)]
    return _gather(_photo_task, tasks, workers)


def render_tiles(level: int, xy: Int64Array, workers: int) -> Pictures:
    """Draw the tiles `xy` of a level."""
    tasks = [(level, part) for _, part in _parts(xy)]
    return _gather(_tile_task, tasks, workers)


def _parts(xy: Int64Array, size: int = 256) -> list[tuple[int, Int64Array]]:
    return [(start, xy[start : start + size]) for start in range(0, len(xy), size)]


def _gather(task: Callable[..., Pictures], tasks: Sequence[tuple[object, ...]], workers: int) -> Pictures:
    if workers == 1:
        done = [task(*arguments) for arguments in tasks]
    else:
        context = multiprocessing.get_context("spawn")  # forking a process with torch's threads can hang
        with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
            done = list(pool.map(task, *zip(*tasks, strict=True)))
    return Pictures(
        np.concatenate([part.pixels for part in done]), np.concatenate([part.captions for part in done])
    )


def _photo_task(xy: Int64Array, seeds: Int64Array) -> Pictures:
    world = default_world()
    pixels = np.empty((len(xy), TILE_SIZE, TILE_SIZE, 3), dtype=np.uint8)
    missing = []
    for i, ((x, y), seed) in enumerate(zip(xy.tolist(), seeds.tolist(), strict=True)):
        picture, lacks = render_photo(world, x, y, seed, PHOTO_HEIGHT)
        left = (picture.shape[1] - PHOTO_HEIGHT) // 2
        square = picture[:, left : left + PHOTO_HEIGHT]
        pixels[i] = cv2.resize(square, (TILE_SIZE, TILE_SIZE), interpolation=cv2.INTER_AREA)
        missing.append(lacks)
    return Pictures(pixels, photo_captions(xy, missing))


def _tile_task(level: int, xy: Int64Array) -> Pictures:
    world = default_world()
    pixels = np.concatenate([render_cells(world, level, part, TILE_SIZE) for _, part in _parts(xy, 32)])
    return Pictures(pixels, tile_captions(level, xy, _has_land(world, level, xy)))


def _has_land(world: World, level: int, xy: Int64Array) -> npt.NDArray[np.bool_]:
    kind = world.land_kind(level, xy)
    land = [
        kind[i] == 1 or (kind[i] == 0 and bool((world.elevation_grid(level, x, y, TILE_SIZE) > 0).any()))
        for i, (x, y) in enumerate(xy.tolist())
    ]
    return np.array(land, dtype=np.bool_)
