"""PMTiles archives on a web server, of which only the parts that are needed are fetched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import TileBatch
from geoengine.engine.sources.decode import Job, Picture, read_picture, stream
from geoengine.engine.sources.description import CachePolicy, SourceDescription
from geoengine.engine.sources.fetch import Answer, Call, Fetcher, UnusableError
from geoengine.engine.sources.pmtiles import FIRST_BYTES, PMTilesSource
from geoengine.engine.sources.template import UrlTemplate
from geoengine.engine.tiles import as_xy

_GAP_BYTES = 16 << 10  # between two tiles that one request fetches together
_RUN_BYTES = 1 << 20


def open_remote_pmtiles(description: SourceDescription, template: UrlTemplate) -> RemotePMTilesSource:
    """Open the PMTiles archive at a URL; raises SourceError as `PMTilesSource` and `Fetcher` do."""
    return RemotePMTilesSource(_RemoteFile(description, template), description)


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
            self._first = self.fetch(0, FIRST_BYTES, Call(self.name)) or b""
        if offset + length <= len(self._first):
            return self._first[offset : offset + length]
        data = self.fetch(offset, length, Call(self.name))
        if data is None:
            raise SourceError(f"{self.name}: the server does not give a part of the file; try later")
        return data

    def fetch(self, offset: int, length: int, call: Call) -> bytes | None:
        """Fetch a part of the file, or None when the server fails, which `call` counts."""

        def read(answer: Answer) -> bytes:
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
            return answer.body

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

    def __init__(self, file: _RemoteFile, description: SourceDescription) -> None:
        self._remote = file
        self._workers = description.concurrency
        super().__init__(file)
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
                self._fetches(z, tiles, call), workers=self._workers, tile_size=lambda _: self.tile_size
            )
        finally:
            call.stopped.set()
        call.finish()

    def _fetches(self, z: int, tiles: list[list[int]], call: Call) -> Iterator[tuple[int, Job]]:
        places = []
        for position, (x, y) in enumerate(tiles):
            place = self.place_of(z, x, y)
            if place is not None:
                places.append((*place, position))
        jobs = []
        for run in _runs(sorted(places)):
            start, end = run[0][0], max(offset + length for offset, length, _ in run)
            part = _Part(self._remote, start, end - start, call)
            jobs += [
                (rank, start, position, partial(part.picture, offset, length))
                for rank, (offset, length, position) in enumerate(run)
            ]
        # The first tile of each run before the second of any, so that threads fetch runs, not wait for one.
        jobs.sort(key=lambda job: job[:3])
        for _, _, position, job in jobs:
            yield position, job


class _Part:
    """A run of tiles, fetched by the first thread that needs one of them."""

    def __init__(self, file: _RemoteFile, start: int, length: int, call: Call) -> None:
        self._file, self._start, self._length, self._call = file, start, length, call
        self._lock = threading.Lock()
        self._data: bytes | None = None
        self._fetched = False

    def picture(self, offset: int, length: int) -> Picture | None:
        with self._lock:
            if not self._fetched:
                self._data = self._file.fetch(self._start, self._length, self._call)
                self._fetched = True
        if self._data is None:
            return None
        return read_picture(self._data[offset - self._start : offset - self._start + length])


def _runs(places: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Split places (offset, length, position), sorted, into those that are fetched together."""
    run: list[tuple[int, int, int]] = []
    for place in places:
        end = run[-1][0] + run[-1][1] if run else 0
        if run and (place[0] > end + _GAP_BYTES or place[0] + place[1] - run[0][0] > _RUN_BYTES):
            yield run
            run = []
        run.append(place)
    if run:
        yield run
