"""From jobs that find the bytes of tiles to batches of pixels, in threads."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias, Union

import numpy as np

from geoengine.engine.sources import TileBatch
from geoengine.engine.sources.decode import Picture, read_picture, write_rgb
from geoengine.engine.sources.decoders import Decoder, tile_decoder

CHUNK = 64
"""Most tiles in a batch."""

_WINDOW = 4 * CHUNK  # tiles under way while the caller is busy with a batch: 50 MB of 256-pixel tiles

Job: TypeAlias = Callable[[], Union[Picture, "Encoded", None]]
"""Gives a tile's picture, its bytes, or None when there is no such tile."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bytes of a tile that are still to be decoded; `otherwise` is the job if they are no picture."""

    data: object
    otherwise: Job | None = None


def stream(
    jobs: Iterable[tuple[int, Job]],
    *,
    workers: int,
    tile_size: Callable[[Picture], int],
    decoder: Decoder | None = None,
) -> Iterator[TileBatch]:
    """Run jobs in threads, which write their tiles straight into the batches that this yields.

    A job comes with a row number of the request; `jobs` itself is drawn from in the caller's thread, never
    more than a few batches ahead. A batch holds what is ready when the caller comes for it, in any order, at
    most CHUNK tiles. `tile_size(picture)` is asked once, with the first tile that arrives, for the side that
    all tiles are brought to. `decoder` decodes what jobs leave to be decoded, by default `tile_decoder()`.
    What a job raises is raised here, and ends the stream; a stream that is closed starts no more jobs.
    """
    jobs = iter(jobs)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="geoengine-tiles")
    work = _Work(pool, decoder or tile_decoder(), _Staging(tile_size))
    window = max(_WINDOW, 2 * work.decoder.batch)
    under_way = 0
    try:
        while True:
            for position, job in islice(jobs, window - under_way):
                pool.submit(work.run, position, job)
                under_way += 1
            if not under_way:
                return
            under_way -= work.wait()
            yield from work.staging.take()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Work:
    """What the threads of a stream do: run jobs, decode what they find, alone or in batches, and stage it."""

    def __init__(self, pool: ThreadPoolExecutor, decoder: Decoder, staging: _Staging) -> None:
        self.decoder, self.staging = decoder, staging
        self._pool = pool
        self._finished: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._undecoded: deque[tuple[int, Encoded]] = deque()
        self._decoding = threading.Lock()

    def wait(self) -> int:
        """Wait for a tile and return how many are done with; raises what a job raised."""
        outcomes = [self._finished.get()]
        while not self._finished.empty():
            outcomes.append(self._finished.get())
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        return len(outcomes)

    def run(self, position: int, job: Job) -> None:
        """Bring one tile to the staging rows."""
        try:
            found = job()
            while isinstance(found, Encoded):
                if self.decoder.takes(found.data):
                    self._undecoded.append((position, found))
                    self._decode_waiting()
                    return
                picture = read_picture(found.data)
                found = picture if picture is not None or found.otherwise is None else found.otherwise()
        except BaseException as error:  # raised where the tiles are wanted
            self._finished.put(error)
        else:
            self._finish(position, found)

    def _decode_waiting(self) -> None:
        """Decode what has come while another thread was decoding, unless one still is.

        Batches grow as large as the decoder is slow, and no tile waits for one to fill. A tile that comes as
        the lock is let go is seen by the thread that held it, which looks once more.
        """
        while self._undecoded and self._decoding.acquire(blocking=False):
            try:
                count = min(len(self._undecoded), self.decoder.batch)
                batch = [self._undecoded.popleft() for _ in range(count)]
                pictures = self.decoder.decode([encoded.data for _, encoded in batch])
            except BaseException as error:
                self._finished.put(error)
                return
            finally:
                self._decoding.release()
            for (position, encoded), picture in zip(batch, pictures, strict=True):
                if picture is None and encoded.otherwise is not None:
                    self._pool.submit(self.run, position, encoded.otherwise)
                else:
                    self._finish(position, picture)

    def _finish(self, position: int, picture: Picture | None) -> None:
        try:
            if picture is not None:
                self.staging.put(position, picture)
        except BaseException as error:
            self._finished.put(error)
        else:
            self._finished.put(None)


class _Block:
    """Rows of one staging array: `taken` given to threads, `sent` handed on."""

    def __init__(self, side: int) -> None:
        self.pixels = np.empty((CHUNK, side, side, 3), np.uint8)
        self.positions = np.empty(CHUNK, np.int64)
        self.written = [False] * CHUNK
        self.taken = self.sent = 0


class _Staging:
    """Arrays that threads write tiles into, row by row, and one reader takes them from."""

    def __init__(self, tile_size: Callable[[Picture], int]) -> None:
        self._tile_size = tile_size
        self._side = 0
        self._blocks: deque[_Block] = deque()
        self._lock = threading.Lock()

    def put(self, position: int, picture: Picture) -> None:
        """Write a picture into the next row."""
        with self._lock:
            self._side = self._side or self._tile_size(picture)
            if not self._blocks or self._blocks[-1].taken == CHUNK:
                self._blocks.append(_Block(self._side))
            block = self._blocks[-1]
            row = block.taken
            block.taken += 1
        write_rgb(picture, block.pixels[row])
        block.positions[row] = position
        block.written[row] = True

    def take(self) -> Iterator[TileBatch]:
        """Yield the rows that are written, up to the first one that still is not."""
        while True:
            with self._lock:
                if not self._blocks:
                    return
                block = self._blocks[0]
                start = end = block.sent
                while end < block.taken and block.written[end]:
                    end += 1
                block.sent = end
                if end == CHUNK:
                    self._blocks.popleft()
            if start == end:
                return
            yield TileBatch(block.positions[start:end], block.pixels[start:end])
