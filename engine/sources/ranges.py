"""PMTiles archives on a web server, of which only the parts that are needed are fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import TileBatch
from geoengine.engine.sources.cache import TileCache
from geoengine.engine.sources.decode import Picture, read_picture
from geoengine.engine.sources.description import CachePolicy, SourceDescription
from geoengine.engine.sources.fetch import Answer, Call, Fetcher, UnusableError
from geoengine.engine.sources.keeping import keep_until
from geoengine.engine.sources.pmtiles import FIRST_BYTES, PMTilesSource
from geoengine.engine.sources.streaming import Encoded, Job, stream
from geoengine.engine.sources.template import UrlTemplate
from geoengine.engine.tiles import Tile, as_xy

_GAP_BYTES = 16 << 10  # between two tiles that one request fetches together
_RUN_BYTES = 1 << 20

_Place = tuple[int, int, int]
"""Offset and length of a tile in the file, and its position in the request."""


MakeCache = Callable[[str], TileCache | None]
"""Returns the cache of the source with an identity, which an archive has only once it is open."""


def open_remote_pmtiles(
    description: SourceDescription, template: UrlTemplate, make_cache: MakeCache
) -> RemotePMTilesSource:
    """Open the PMTiles archive at a URL; raises SourceError as `PMTilesSource` and `Fetcher` do."""
    return RemotePMTilesSource(_RemoteFile(description, template), description, make_cache)


class _RemoteFile:
    """A file on a server that answers range requests."""

    def __init__(self, description: SourceDescription, template: UrlTemplate) -> None:
        self.name = template.shown
        self._url = template.url()
        self._fetcher = Fetcher(description, template)
        self._first = b""  # the header, the root directory and, as a rule, the metadata

    def read(self, offset: int, length: int) -> bytes:
        """Return a part of the file, shorter where the file ends."""
        if not self._first:
            self._first = self._part(0, FIRST_BYTES)
        if offset + length <= len(self._first):
            return self._first[offset : offset + length]
        return self._part(offset, length)

    def _part(self, offset: int, length: int) -> bytes:
        answer = self.fetch(offset, length, Call(self.name))
        if answer is None:
            raise SourceError(f"{self.name}: the server does not give a part of the file; try later")
        return answer.body

    def fetch(self, offset: int, length: int, call: Call) -> Answer | None:
        """Fetch a part of the file, or None when the server fails, which `call` counts."""

        def read(answer: Answer) -> Answer:
            if answer.status == 200:
                raise SourceError(
                    f"{self.name}: the server does not answer range requests; download the file first"
                )
            if answer.status != 206:
                raise SourceError(f"{self.name}: there is no such file (HTTP {answer.status})")
            total = answer.headers.get("content-range", "").rpartition("/")[2]
            if offset and total.isdecimal() and offset + length > int(total):
                raise SourceError(f"{self.name}: this file is cut short, or it has changed")
            if len(answer.body) > length or (len(answer.body) < length and offset):
                raise UnusableError("it sent another part of the file than it was asked for")
            return answer

        what = f"bytes {offset} to {offset + length - 1}"
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        return self._fetcher.get(self._url, read, what=what, call=call, headers=headers)

    def close(self) -> None:
        """Close the connections."""
        self._fetcher.close()


class RemotePMTilesSource(PMTilesSource):
    """The pictures in a PMTiles archive on a server.

    Tiles that lie side by side, as the 16 children of a tile do, are fetched with one request.
    """

    def __init__(self, file: _RemoteFile, description: SourceDescription, make_cache: MakeCache) -> None:
        self._remote, self._description = file, description
        self._cache: TileCache | None = None
        super().__init__(file)
        self._cache = make_cache(self.identity)
        self.storable = description.cache is not CachePolicy.NONE
        self.attribution = description.attribution or self.attribution
        self.min_zoom = max(self.min_zoom, description.min_zoom)
        self.max_zoom = min(self.max_zoom, description.max_zoom)

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles of the request that the archive has."""
        tiles = as_xy(z, xy).tolist()
        if not self.min_zoom <= z <= self.max_zoom:
            return
        call = Call(self.name)
        try:
            yield from stream(
                self._all_jobs(z, tiles, call),
                workers=self._description.concurrency,
                tile_size=lambda _: self.tile_size,
            )
        finally:
            call.stopped.set()
            if self._cache is not None:
                self._cache.flush()
        call.finish()

    def close(self) -> None:
        """Close the connections and the cache."""
        super().close()
        if self._cache is not None:
            self._cache.close()

    def _all_jobs(self, z: int, tiles: list[list[int]], call: Call) -> Iterator[tuple[int, Job]]:
        wanted = [Tile(z, x, y) for x, y in tiles]
        kept = self._cache.get(wanted) if self._cache is not None else {}
        places: list[_Place] = []
        for position, tile in enumerate(wanted):
            if tile in kept:
                yield position, partial(self._from_cache, tile, kept[tile].data, call)
            elif (place := self.place_of(*tile)) is not None:
                places.append((*place, position))
        yield from self._fetches(places, wanted, call)

    def _fetches(self, places: list[_Place], wanted: list[Tile], call: Call) -> Iterator[tuple[int, Job]]:
        jobs = []
        for run in _runs(sorted(places)):
            start, end = run[0][0], max(offset + length for offset, length, _ in run)
            part = _Part(self._remote, start, end - start, call)
            jobs += [
                (rank, start, position, partial(self._picture, part, wanted[position], offset, length))
                for rank, (offset, length, position) in enumerate(run)
            ]
        # The first tile of each run before the second of any, so that threads fetch runs, not wait for one.
        jobs.sort(key=lambda job: job[:3])
        for _, _, position, job in jobs:
            yield position, job

    def _from_cache(self, tile: Tile, data: bytes, call: Call) -> Encoded:
        call.answered()
        return Encoded(data, partial(self._fetch_again, tile, call))

    def _fetch_again(self, tile: Tile, call: Call) -> Picture | None:
        """Fetch a tile whose bytes in the cache are no picture."""
        if self._cache is not None:
            self._cache.drop(tile)
        place = self.place_of(*tile)
        return None if place is None else self._fetched(_Part(self._remote, *place, call), tile, *place)

    def _picture(self, part: _Part, tile: Tile, offset: int, length: int) -> Picture | None:
        picture = self._fetched(part, tile, offset, length)
        if picture is not None or part.answer() is None:
            return picture
        return self._fetched(part.of(offset, length), tile, offset, length)

    def _fetched(self, part: _Part, tile: Tile, offset: int, length: int) -> Picture | None:
        """Return a tile of the run, once that has been fetched, and keep it if it is a picture."""
        answer = part.answer()
        if answer is None:
            return None
        data = answer.body[offset - part.start : offset - part.start + length]
        picture = read_picture(data)
        if picture is not None and self._cache is not None:
            until = keep_until(self._description, answer.headers, missing=False)
            if until is not None:
                self._cache.put(tile, data, until)
        return picture


class _Part:
    """A run of tiles, fetched by the first thread that needs one of them."""

    def __init__(self, file: _RemoteFile, start: int, length: int, call: Call) -> None:
        self.start = start
        self._file, self._length, self._call = file, length, call
        self._lock = threading.Lock()
        self._answer: Answer | None = None
        self._fetched = False

    def of(self, start: int, length: int) -> _Part:
        """Return a run of its own for one tile."""
        return _Part(self._file, start, length, self._call)

    def answer(self) -> Answer | None:
        """Return the server's answer, or None when it failed."""
        with self._lock:
            if not self._fetched:
                self._answer = self._file.fetch(self.start, self._length, self._call)
                self._fetched = True
            return self._answer


def _runs(places: list[_Place]) -> Iterator[list[_Place]]:
    """Split places (offset, length, position), sorted, into those that are fetched together."""
    run: list[_Place] = []
    for place in places:
        end = run[-1][0] + run[-1][1] if run else 0
        if run and (place[0] > end + _GAP_BYTES or place[0] + place[1] - run[0][0] > _RUN_BYTES):
            yield run
            run = []
        run.append(place)
    if run:
        yield run
