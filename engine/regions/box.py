"""Regions between two meridians and two parallels, and the part that two regions have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geoengine.engine.regions import Region
from geoengine.engine.sources import WORLD_BOUNDS, TileSource
from geoengine.engine.tiles import LngLatBbox, XyArray, tile_count, xy_in_bbox


@dataclass(frozen=True, slots=True)
class Box:
    """A box in degrees; west > east crosses the antimeridian. Tiles that it only touches are left out."""

    bbox: LngLatBbox
    of_earth = False

    @property
    def name(self) -> str:
        """The box as the command line takes it."""
        return ",".join(f"{edge:g}" for edge in self.bbox)

    def tiles(self, z: int) -> XyArray:
        """Return the tiles of zoom z that the box overlaps, int64[n, 2], sorted."""
        xy = xy_in_bbox(self.bbox, z)
        return xy[np.lexsort((xy[:, 1], xy[:, 0]))]

    def intersects(self, z: int, xy: XyArray) -> npt.NDArray[np.bool_]:
        """Tell which of the tiles int64[n, 2] the box overlaps, bool[n]."""
        west, south, east, north = self.bbox
        # A box of no height has the columns of the whole one, a box of no width its rows.
        columns = xy_in_bbox(LngLatBbox(west, north, east, north), z)[:, 0]
        rows = xy_in_bbox(LngLatBbox(west, south, west, north), z)[:, 1]
        offset = (xy[:, 0] - columns[0]) % tile_count(z)
        return np.asarray((offset < len(columns)) & (rows[0] <= xy[:, 1]) & (xy[:, 1] <= rows[-1]))


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two regions have in common, to a tile; the first one is the smaller."""

    first: Region
    second: Region

    @property
    def name(self) -> str:
        """The names of both."""
        return f"{self.first.name}, {self.second.name}"

    @property
    def of_earth(self) -> bool:
        """Whether one of the two means a place on Earth."""
        return self.first.of_earth or self.second.of_earth

    def tiles(self, z: int) -> XyArray:
        """Return the tiles of zoom z that both overlap, int64[n, 2], sorted."""
        xy = self.first.tiles(z)
        return xy[self.second.intersects(z, xy)]

    def intersects(self, z: int, xy: XyArray) -> npt.NDArray[np.bool_]:
        """Tell which of the tiles int64[n, 2] both overlap, bool[n]."""
        return self.first.intersects(z, xy) & self.second.intersects(z, xy)


def searched_area(source: TileSource, within: Region | None) -> Region | None:
    """Return the part of a region in which a source has tiles; None for all of the world."""
    if source.bounds == WORLD_BOUNDS:
        return within
    bounds = Box(source.bounds)
    return bounds if within is None else Overlap(within, bounds)
