"""Tile pictures on their way from a source to an encoder: read ahead, each distinct one handed on once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.errors import SourceError
from geoengine.engine.readahead import ReadAhead
from geoengine.engine.sources import TileBatch, TileSource

READ_AHEAD = 2
"""Batches of the tile source that may wait for the encoder."""

MOST_ENLARGED = 3
"""Zooms between a tile and the coarser one that it may be cut out of: an eighth of the side is left."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What has become of the tiles that were asked for.

    `rows` is int64[n], the number of the picture that a tile has, -1 for a tile without one; `enlarged` is
    bool[n], the tiles cut out of a coarser one. With `late`, the time was up before all had arrived.
    """

    rows: NDArray[np.int64]
    enlarged: NDArray[np.bool_]
    late: bool


class Append(Protocol):
    """Takes pictures; see `EmbeddingRows.append`."""

    def __call__(self, pixels: NDArray[np.uint8], digests: Sequence[bytes]) -> None:
        """Take uint8[n, S, S, 3] and a digest of each picture."""
        ...


@dataclass(frozen=True, slots=True)
class _Batch:
    tiles: TileBatch
    digests: list[bytes]
    enlarged: bool


def hand_on(
    source: TileSource,
    zoom: int,
    xy: NDArray[np.int64],
    append: Append,
    *,
    batch: int,
    progress: Callable[[int], None],
    until: float | None = None,
    overzoom: bool = False,
) -> Arrivals:
    """Read the tiles `xy`, int64[n, 2], of a zoom, and give their distinct pictures to `append`.

    `append` gets uint8[m, S, S, 3], at most `batch` pictures at a time, and fewer whenever no further one is
    there yet, with their digests; it may keep nothing of the array. Pictures are numbered in the order in
    which it gets them. Reading and hashing run on a thread of their own, ahead of `append`. `progress` hears
    of how many tiles have arrived. `until`, a time of `time.monotonic`, ends it with what has arrived by
    then. With `overzoom`, tiles that the source lacks are cut out of coarser ones, and enlarged.

    Raises SourceError for a source that breaks its promise; what the source and `append` raise passes
    through, and no thread is left behind but one that waits for a late tile.
    """
    rows = np.full(len(xy), -1, dtype=np.int64)
    enlarged = np.zeros(len(xy), dtype=bool)
    row_of: dict[bytes, int] = {}
    staging = np.empty((0, 0, 0, 3), dtype=np.uint8)
    staged: list[bytes] = []
    done = 0
    with ReadAhead(lambda: _hashed(source, zoom, xy, overzoom), depth=READ_AHEAD) as ahead:
        while True:
            if staged and not ahead.waiting:
                append(staging[: len(staged)], staged)
                staged = []
            try:
                arrived = ahead.take(until)
            except StopIteration:
                break
            except TimeoutError:
                ahead.abandon()
                break
            positions, pixels = arrived.tiles.positions, arrived.tiles.pixels
            if not staging.size:
                staging = np.empty((min(batch, len(xy)), *pixels.shape[1:]), dtype=np.uint8)
            for position, digest, picture in zip(positions.tolist(), arrived.digests, pixels, strict=True):
                if digest not in row_of:
                    row_of[digest] = len(row_of)
                    staging[len(staged)] = picture
                    staged.append(digest)
                    if len(staged) == len(staging):
                        append(staging, staged)
                        staged = []
                rows[position] = row_of[digest]
            enlarged[positions] = arrived.enlarged
            done += len(positions)
            progress(done)
            if until is not None and time.monotonic() >= until:
                ahead.abandon()
                break
        if staged:
            append(staging[: len(staged)], staged)
    return Arrivals(rows, enlarged, late=ahead.abandoned and done < len(xy))


def _hashed(source: TileSource, zoom: int, xy: NDArray[np.int64], overzoom: bool) -> Iterator[_Batch]:
    """Add to each batch a digest of each picture's pixels, after checking what the source hands out."""
    side = 0
    for batch, enlarged in _read(source, zoom, xy, overzoom):
        side = side or batch.pixels.shape[1]
        expected = (len(batch.positions), side, side, 3)
        if batch.pixels.shape != expected or batch.pixels.dtype != np.uint8:
            raise SourceError(
                f"tile source {source.name} gave {batch.pixels.dtype} pictures of shape {batch.pixels.shape} "
                f"instead of uint8 {expected}"
            )
        # SHA-256 is the fastest of hashlib's where the CPU has instructions for it: 20 us for 112 px.
        digests = [hashlib.sha256(picture).digest() for picture in np.ascontiguousarray(batch.pixels)]
        yield _Batch(batch, digests, enlarged)


def _read(
    source: TileSource, zoom: int, xy: NDArray[np.int64], overzoom: bool
) -> Iterator[tuple[TileBatch, bool]]:
    """Yield the batches of the source, and then those that are cut out of coarser tiles."""
    if not overzoom:
        for batch in source.read(zoom, xy):
            yield batch, False
        return
    lacking = np.ones(len(xy), dtype=bool)
    if zoom <= source.max_zoom:
        for batch in source.read(zoom, xy):
            lacking[batch.positions] = False
            yield batch, False
    for up in range(max(1, zoom - source.max_zoom), MOST_ENLARGED + 1):
        wanted = np.flatnonzero(lacking)
        if not len(wanted) or zoom - up < source.min_zoom:
            return
        coarse, of = np.unique(xy[wanted] >> up, axis=0, return_inverse=True)
        order = np.argsort(of, kind="stable")
        starts = np.searchsorted(of, np.arange(len(coarse) + 1), sorter=order)
        for batch in source.read(zoom - up, coarse):
            for row, picture in zip(batch.positions.tolist(), batch.pixels, strict=True):
                own = wanted[order[starts[row] : starts[row + 1]]]
                lacking[own] = False
                yield TileBatch(own, _cut(picture, xy[own], up)), True


def _cut(picture: NDArray[np.uint8], xy: NDArray[np.int64], up: int) -> NDArray[np.uint8]:
    """Cut tiles out of the one `up` zooms coarser that they lie in, and enlarge them; uint8[n, S, S, 3]."""
    import cv2

    side = len(picture)
    part = max(1, side >> up)
    corners = (xy & ((1 << up) - 1)) * side >> up
    return np.stack(
        [
            cv2.resize(
                picture[top : top + part, left : left + part], (side, side), interpolation=cv2.INTER_CUBIC
            )
            for left, top in corners.tolist()
        ]
    )
