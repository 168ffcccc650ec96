"""Fetching a region's tiles ahead, into an MBTiles file, where the terms of the server allow it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import TileSource
from geoengine.engine.sources.description import CachePolicy, Part, SourceDescription
from geoengine.engine.sources.http import template_of
from geoengine.engine.sources.opening import open_server
from geoengine.engine.sources.upkeep import keys_of, make_single_file, mean_tile_bytes
from geoengine.engine.tiles import XyArray

SAMPLE = 24
"""Tiles fetched for the estimate; they stay in the pack."""

_CHUNK = 2048  # tiles asked for at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Tiles of the region, those that the pack knows of, and what the rest will take."""

    tiles: int
    known: int
    bytes: float
    seconds: float


class Prefetch:
    """The tiles of a region and some zooms, fetched from one server into a pack.

    `tiles(z)` gives the region's tiles, int64[n, 2]. The same prefetch goes on where an earlier one stopped.
    Raises SourceError for sources that are files, that are several servers, whose terms do not allow it, and
    that lack a zoom, and for an `out` that is another file.
    """

    def __init__(
        self, parts: Sequence[Part], zooms: Sequence[int], tiles: Callable[[int], XyArray], out: Path
    ) -> None:
        self.description = server_of(parts, zooms)
        self.out = out
        if out.suffix.lower() != ".mbtiles":
            raise SourceError(f"{out}: a pack is an MBTiles file: give it a name that ends in .mbtiles")
        self._wanted = {zoom: tiles(zoom) for zoom in zooms}
        self.total = sum(map(len, self._wanted.values()))
        if not self.total:
            raise SourceError("the region has no tile at these zooms")

    def estimate(self) -> Estimate:
        """Fetch a few tiles of the finest zoom, and say what the others will take."""
        left = {zoom: self._left(zoom) for zoom in self._wanted}
        count = sum(map(len, left.values()))
        if not count:
            return Estimate(tiles=self.total, known=self.total, bytes=0.0, seconds=0.0)
        zoom = max(zoom for zoom, xy in left.items() if len(xy))
        chosen = np.random.default_rng(0).permutation(len(left[zoom]))[:SAMPLE]
        start = time.perf_counter()
        with closing(self._open()) as source:
            for _ in source.read(zoom, left[zoom][chosen]):
                pass
        rate = len(chosen) / (time.perf_counter() - start)
        if self.description.rate_per_s:
            rate = min(rate, self.description.rate_per_s)
        count -= len(chosen)
        return Estimate(
            tiles=self.total,
            known=self.total - count,
            bytes=count * mean_tile_bytes(self.out),
            seconds=count / rate,
        )

    def run(self) -> Iterator[tuple[int, int]]:
        """Fetch what the pack lacks, and yield (zoom, tiles of the region that the pack knows now)."""
        left = {zoom: self._left(zoom) for zoom in sorted(self._wanted)}
        done = self.total - sum(map(len, left.values()))
        with closing(self._open()) as source:
            for zoom, xy in left.items():
                for start in range(0, len(xy), _CHUNK):
                    part = xy[start : start + _CHUNK]
                    arrived = done
                    for batch in source.read(zoom, part):
                        arrived += len(batch.positions)
                        yield zoom, arrived
                    done += len(part)  # and those that do not exist
                    yield zoom, done
        make_single_file(self.out)

    def _left(self, zoom: int) -> XyArray:
        """Return the tiles of a zoom that the pack does not know of yet."""
        known, last = keys_of(self.out, zoom), (1 << zoom) - 1
        wanted = self._wanted[zoom]
        return wanted[[(x, last - y) not in known for x, y in wanted.tolist()]] if known else wanted

    def _open(self) -> TileSource:
        return open_server(self.description, pack=self.out)


def server_of(parts: Sequence[Part], zooms: Sequence[int]) -> SourceDescription:
    """Return the one server that has all zooms and may be asked for many tiles; raises SourceError."""
    asked = [part for part in parts if any(part.min_zoom <= zoom <= part.max_zoom for zoom in zooms)]
    if not asked:
        raise SourceError("the source has none of these zooms")
    if len(asked) > 1:
        spans = ", ".join(f"{part.min_zoom}-{part.max_zoom}" for part in asked)
        raise SourceError(f"these zooms come from several sources ({spans}): fetch each into its own pack")
    [part] = asked
    if not isinstance(part, SourceDescription):
        raise SourceError(f"{part.path}: these tiles are in a file already")
    if template_of(part).is_archive:
        raise SourceError("these tiles are in one PMTiles file: download that")
    absent = [zoom for zoom in zooms if not part.min_zoom <= zoom <= part.max_zoom]
    if absent:
        raise SourceError(
            f"the source has zooms {part.min_zoom} to {part.max_zoom}, not {', '.join(map(str, absent))}"
        )
    if not part.prefetch or part.cache is CachePolicy.NONE:
        terms = f"; its terms: {part.terms}" if part.terms else ""
        raise SourceError(
            "nothing says that this server allows its tiles to be fetched in bulk: ask it, and describe it "
            f"in a .toml file with prefetch = true{terms}"
        )
    return part
