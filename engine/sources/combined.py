"""Several tile sources as one, each for its zooms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from geoengine.engine.sources import TileBatch, TileSource, fingerprint
from geoengine.engine.tiles import LngLatBbox, as_xy


class CombinedSource:
    """Sources whose zooms do not overlap, coarse to fine; zooms that none has are missing."""

    world = "earth"

    def __init__(self, sources: Sequence[TileSource]) -> None:
        self._sources = tuple(sources)
        self.name = " + ".join(source.name for source in sources)
        self.attribution = "; ".join(dict.fromkeys(s.attribution for s in sources if s.attribution))
        self.min_zoom, self.max_zoom = sources[0].min_zoom, sources[-1].max_zoom
        self.identity = fingerprint(
            "combined", *(f"{s.min_zoom}-{s.max_zoom} {s.identity}" for s in self._sources)
        )
        self.storable = all(source.storable for source in sources)

    @property
    def tile_size(self) -> int:
        """Side of the coarsest source's tiles in pixels."""
        return self._sources[0].tile_size

    @property
    def bounds(self) -> LngLatBbox:
        """The box of the coarsest source: what the others lack beyond theirs is missing."""
        return self._sources[0].bounds

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles of the request from the source that has the zoom."""
        tiles = as_xy(z, xy)
        for source in self._sources:
            if source.min_zoom <= z <= source.max_zoom:
                yield from source.read(z, tiles)

    def close(self) -> None:
        """Close all sources."""
        with ExitStack() as stack:
            for source in self._sources:
                stack.callback(source.close)


class Limited:
    """A source of which only some zooms are wanted."""

    world = "earth"

    def __init__(self, source: TileSource, min_zoom: int, max_zoom: int) -> None:
        self._source = source
        self.name, self.attribution = source.name, source.attribution
        self.identity, self.storable, self.bounds = source.identity, source.storable, source.bounds
        self.tile_size = source.tile_size
        self.min_zoom = max(min_zoom, source.min_zoom)
        self.max_zoom = min(max_zoom, source.max_zoom)

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles of the request, if their zoom is wanted."""
        tiles = as_xy(z, xy)
        if self.min_zoom <= z <= self.max_zoom:
            yield from self._source.read(z, tiles)

    def close(self) -> None:
        """Close the source."""
        self._source.close()
