"""Map pictures for the HTML map: a mosaic of the world, and one of every kept tile that was refined."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geoengine.engine.results import Location
from geoengine.engine.sources import TileSource
from geoengine.engine.tiles import Tile, parent

MAX_JPEG_BYTES = 1_350_000
"""All pictures of a page together; as base64 they are a third larger, which keeps the page below 2 MB."""

MAX_DETAILED_PHOTOS = 12
"""Photos with pictures of every level; the others have the world only, so that few tiles are asked for."""

_SIDES = (1024, 768, 512, 384, 256, 160)  # pixels; the largest within a picture's part of the budget is taken
_JPEG_QUALITY = 72
_LARGE_TILE = 200  # pixels; from this side on, tiles one zoom coarser than the level do, a quarter as many
_NO_TILE = 128  # grey where the source has no tile


@dataclass(frozen=True, order=True, slots=True)
class Region:
    """A block of tiles of zoom `z`: columns [x0, x0 + columns), rows [y0, y0 + rows).

    Columns may be negative or beyond the last one; they continue round the world.
    """

    z: int
    x0: int
    y0: int
    columns: int
    rows: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge in world widths, from the map's north-west corner."""
        n = 1 << self.z
        return self.x0 / n, self.y0 / n, (self.x0 + self.columns) / n, (self.y0 + self.rows) / n


@dataclass(frozen=True, slots=True)
class Backdrop:
    """A picture of a region, as JPEG."""

    region: Region
    jpeg: bytes


def read_backdrops(locations: Sequence[Location], source: TileSource) -> list[Backdrop]:
    """Read the pictures for a page, the world first, then coarse to fine; about MAX_JPEG_BYTES at most.

    Regions of which the source has no tile are left out. Raises SourceError when the source does not answer.
    """
    large = source.tile_size >= _LARGE_TILE
    world = Region(2, 0, 0, 4, 4) if large else Region(3, 0, 0, 8, 8)
    details = {
        region for location in locations[:MAX_DETAILED_PHOTOS] for region in level_regions(location, large)
    }
    regions = [world, *sorted(details)]
    budget = MAX_JPEG_BYTES // len(regions)
    backdrops = []
    for region in regions:
        mosaic = _read_mosaic(region, source)
        if mosaic is not None:
            backdrops.append(Backdrop(region, _jpeg(mosaic, budget)))
    return backdrops


def level_regions(location: Location, large_tiles: bool) -> Iterator[Region]:
    """Yield, for each level but the first, the kept tile that it refines, with half its side around it."""
    path = location.candidates[0].path
    for before, step in itertools.pairwise(path):
        anchor = parent(step.tile, max(before.tile.z, step.tile.z - 2))
        yield _around(anchor, step.tile.z - 1 if large_tiles else step.tile.z)


def _around(anchor: Tile, z: int) -> Region:
    side = 1 << (z - anchor.z)  # of the anchor, in tiles of zoom z
    margin = max(1, side // 2)
    n = 1 << z
    y0, y1 = max(0, anchor.y * side - margin), min(n, (anchor.y + 1) * side + margin)
    columns = side + 2 * margin
    if columns >= n:
        return Region(z, 0, y0, n, y1 - y0)
    return Region(z, anchor.x * side - margin, y0, columns, y1 - y0)


def _read_mosaic(region: Region, source: TileSource) -> npt.NDArray[np.uint8] | None:
    """Return uint8[rows * S, columns * S, 3], grey where there is no tile; None when there is none at all."""
    cells = np.indices((region.columns, region.rows)).reshape(2, -1).T  # (tiles, 2)
    xy = cells.astype(np.int64) + np.array([region.x0, region.y0])
    xy[:, 0] %= 1 << region.z
    mosaic: npt.NDArray[np.uint8] | None = None
    for batch in source.read(region.z, xy):
        side = batch.pixels.shape[1]
        if mosaic is None:
            mosaic = np.full((region.rows * side, region.columns * side, 3), _NO_TILE, np.uint8)
        for position, pixels in zip(batch.positions, batch.pixels, strict=True):
            left, top = cells[position] * side
            mosaic[top : top + side, left : left + side] = pixels
    return mosaic


def _jpeg(mosaic: npt.NDArray[np.uint8], budget: int) -> bytes:
    """Return the mosaic at the largest side whose JPEG has at most `budget` bytes, else at the smallest."""
    from PIL import Image

    picture = Image.fromarray(mosaic)
    encoded = b""
    for side in _SIDES:
        smaller = picture.copy()
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        encoded = buffer.getvalue()
        if len(encoded) <= budget:
            break
    return encoded
