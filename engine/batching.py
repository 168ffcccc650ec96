"""One backend for many searches at once: their pictures share batches, and one's trouble stays its own."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import Backend
from geoengine.engine.errors import BackendError, GeoEngineError
from geoengine.engine.shared_search import SearchEndedError, SharedRows, SharedSearch

KEPT_EMBEDDINGS = 4096
"""Embeddings that are kept by their picture: the ocean and the ice, which many places look like."""

_QUEUED_BATCHES = 4  # of one search: more would only take memory
_LEAST_TURN = 8  # pictures that a client gets at a time: heads of fewer would cost more than they do
_FAILING = 3  # batches in a row of which nothing came out
_CLOSED = "the encoders are closed"

_log = logging.getLogger(__name__)

Key: TypeAlias = tuple[str, bytes]
"""An encoder and the digest of a picture, b"" for one that is nobody else's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchDone:
    """What one batch was: pictures, the clients and searches that wanted them, seconds, and how it went."""

    pictures: int
    searches: int
    encoders: int
    seconds: float
    failed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderState:
    """How the encoder is doing: pictures that wait, seconds the batch under way has taken, failures in a row.

    `encoded`, `shared` and `known` count pictures since the start: those that went through the encoder, those
    that another search was waiting for already, and those whose embeddings were kept.
    """

    waiting: int
    busy_s: float
    failures: int
    reason: str
    encoded: int
    shared: int
    known: int

    @property
    def failing(self) -> bool:
        """Whether nothing has come out of the encoder for a while, whoever asked."""
        return self.failures >= _FAILING


class _Picture:
    """One picture in the queue, and the places where its embedding is waited for."""

    __slots__ = ("key", "pixels", "waiters")

    def __init__(self, key: Key, pixels: NDArray[np.uint8], rows: SharedRows, place: int) -> None:
        self.key, self.pixels = key, pixels
        self.waiters = [(rows, place)]  # the first is the one that has queued it

    @property
    def wanted(self) -> bool:
        return any(rows.search.error is None for rows, _ in self.waiters)


class SharedEncoders:
    """Runs the pictures of many searches, from any number of threads, in shared batches on one backend.

    `search` gives each search its own face of it. A batch takes pictures from all clients in turn, whatever
    their level: the trunk runs once for all of them. A picture that several searches want is encoded once;
    with `kept`, so many embeddings are kept for later ones, which the terms of the tiles must allow. A
    batch that fails is tried again in halves, so that only searches with a picture that fails alone fail.
    `on_batch` is called after each batch, on the encoder's thread.

    `close` fails what is under way, and closes the backend unless a batch hangs in it.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        kept: int = KEPT_EMBEDDINGS,
        on_batch: Callable[[BatchDone], None] | None = None,
    ) -> None:
        self.backend = backend
        self._kept, self._on_batch = kept, on_batch
        self.changed = threading.Condition()
        self._queues: OrderedDict[str, deque[_Picture]] = OrderedDict()  # by client, the next one first
        self._batch: list[_Picture] = []  # under way
        self._pending: dict[Key, _Picture] = {}  # queued or being encoded, those with a digest
        self._known: OrderedDict[Key, NDArray[np.float32]] = OrderedDict()
        self._waiting = 0
        self._since: float | None = None
        self._failures, self._reason = 0, ""
        self._counts = {"encoded": 0, "shared": 0, "known": 0}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="geoengine-encoder", daemon=True)
        self._thread.start()

    def search(self, client: str, *, until: float | None = None) -> SharedSearch:
        """Return the encoders of one search of a client; `until` is its end, a time of `time.monotonic`."""
        return SharedSearch(self, client, until)

    @property
    def state(self) -> EncoderState:
        """How the encoder is doing."""
        with self.changed:
            busy_s = 0.0 if self._since is None else time.monotonic() - self._since
            return EncoderState(
                waiting=self._waiting,
                busy_s=busy_s,
                failures=self._failures,
                reason=self._reason,
                **self._counts,
            )

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Fail the searches under way and end; wait no longer than `timeout_s` for a batch that hangs."""
        self._give_up()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self.backend.close()

    # --- the searches' side, on their threads --------------------------------------------------------------

    def submit(
        self, rows: SharedRows, encoder: str, pixels: NDArray[np.uint8], digests: Sequence[bytes]
    ) -> None:
        """Queue pictures for consecutive rows; waits while the search has too many in the queue."""
        search, most = rows.search, _QUEUED_BATCHES * self.backend.batch
        keys = [(encoder, digest) for digest in digests or [b""] * len(pixels)]
        copied = pixels.copy()  # the caller's array is its own again
        with self.changed:
            search.wait(lambda: search.queued < most)
            if self._closed:
                raise SearchEndedError(_CLOSED)
            first = rows.count
            rows.count, rows.left = first + len(keys), rows.left + len(keys)
            new = []
            for place, (key, picture) in enumerate(zip(keys, copied, strict=True), start=first):
                if not self._find(key, rows, place):
                    new.append(_Picture(key, picture, rows, place))
            self._pending.update((picture.key, picture) for picture in new if picture.key[1])
            if new:
                search.queued += len(new)
                self._waiting += len(new)
                self._queues.setdefault(search.client, deque()).extend(new)
                self.changed.notify_all()

    def _find(self, key: Key, rows: SharedRows, place: int) -> bool:
        """Take an embedding that is known, or wait for one that is on its way; False when there is none."""
        kept, pending = self._known.get(key), self._pending.get(key)
        if kept is not None:
            self._known.move_to_end(key)
            self._counts["known"] += 1
            rows.fill(place, kept)
        elif pending is not None:
            self._counts["shared"] += 1
            pending.waiters.append((rows, place))
        return kept is not None or pending is not None

    # --- the encoder's side, on its thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._batch = self._next()
                self._encode(self._batch)
        finally:
            self._give_up()

    def _next(self) -> list[_Picture]:
        """Wait for pictures and take those of the next batch; none when they were given up, or at the end."""
        with self.changed:
            self._since = None
            self.changed.wait_for(lambda: self._queues or self._closed)
            self._since = time.monotonic()
            return self._take(self.backend.batch)

    def _take(self, most: int) -> list[_Picture]:
        """Take pictures that are still wanted from all clients in turn; whose turn was goes to the end."""
        batch: list[_Picture] = []
        while self._queues and len(batch) < most:
            turn = min(most, len(batch) + max(_LEAST_TURN, most // len(self._queues)))
            client, queue = self._queues.popitem(last=False)
            while queue and len(batch) < turn:
                picture = queue.popleft()
                self._waiting -= 1
                if picture.wanted:
                    batch.append(picture)
                else:
                    self._settle(picture)
            if queue:
                self._queues[client] = queue
        return batch

    def _encode(self, batch: list[_Picture]) -> None:
        if not batch:
            return
        batch.sort(key=lambda picture: (picture.key[0], picture.pixels.shape))  # few, long runs of each head
        with self.changed:
            searches = len({id(rows.search) for picture in batch for rows, _ in picture.waiters})
        start = time.monotonic()
        done = failed = 0
        for pictures, embeddings, error in self._halves(batch):
            with self.changed:
                if error is None:
                    for picture, embedding in zip(pictures, embeddings, strict=True):
                        self._deliver(picture, embedding)
                    done += len(pictures)
                else:
                    self._reason = str(error)
                    for picture in pictures:
                        self._fail(picture, error)
                    failed += len(pictures)
                self.changed.notify_all()
        with self.changed:
            self._failures = 0 if done or not failed else self._failures + 1
            self._counts["encoded"] += done
        if self._on_batch is not None:
            encoders, seconds = len({picture.key[0] for picture in batch}), time.monotonic() - start
            self._on_batch(
                BatchDone(
                    pictures=len(batch), searches=searches, encoders=encoders, seconds=seconds, failed=failed
                )
            )

    def _halves(
        self, pictures: list[_Picture]
    ) -> Iterator[tuple[list[_Picture], Sequence[NDArray[np.float32]], GeoEngineError | None]]:
        """Yield pictures with their embeddings, or single ones with why they have none."""
        pictures = [picture for picture in pictures if self._still_wanted(picture)]
        if not pictures:
            return
        try:
            embeddings = self._embeddings(pictures)
        except Exception as error:  # whatever a backend raises is the searches' to hear
            if len(pictures) == 1:
                _log.warning("a picture cannot be encoded: %s", type(error).__name__)
                yield pictures, (), _told(error)
            else:
                middle = len(pictures) // 2
                yield from self._halves(pictures[:middle])
                yield from self._halves(pictures[middle:])
            return
        yield pictures, embeddings, None

    def _still_wanted(self, picture: _Picture) -> bool:
        with self.changed:
            if not picture.wanted:
                self._settle(picture)
            return picture.wanted

    def _embeddings(self, pictures: Sequence[_Picture]) -> list[NDArray[np.float32]]:
        runs = itertools.groupby(pictures, key=lambda picture: (picture.key[0], picture.pixels.shape))
        groups = [(encoder, np.stack([one.pixels for one in run])) for (encoder, _), run in runs]
        found = [row for rows in self.backend.encode_mixed(groups) for row in rows]
        if len(found) != len(pictures):
            raise BackendError(f"the encoder gave {len(found)} embeddings for {len(pictures)} pictures")
        return found

    def _deliver(self, picture: _Picture, embedding: NDArray[np.float32]) -> None:
        for rows, place in picture.waiters:
            rows.fill(place, embedding)
        if self._kept and picture.key[1]:
            self._known[picture.key] = embedding.copy()  # without the others of its batch
            while len(self._known) > self._kept:
                self._known.popitem(last=False)
        self._settle(picture)

    def _fail(self, picture: _Picture, error: GeoEngineError) -> None:
        for rows, _ in picture.waiters:
            rows.search.end(type(error)(str(error)))  # raised on a thread of its own
        self._settle(picture)

    def _settle(self, picture: _Picture) -> None:
        """Forget a picture that is done, failed, or wanted by nobody."""
        if self._pending.get(picture.key) is picture:
            del self._pending[picture.key]
        picture.waiters[0][0].search.queued -= 1

    def _give_up(self) -> None:
        with self.changed:
            self._closed = True
            for picture in (*self._batch, *itertools.chain(*self._queues.values())):
                if picture.wanted:
                    self._fail(picture, SearchEndedError(_CLOSED))
            self._queues.clear()
            self._waiting = 0
            self.changed.notify_all()


def _told(error: Exception) -> GeoEngineError:
    if isinstance(error, GeoEngineError):
        return error
    return BackendError(f"the encoder failed ({type(error).__name__}: {error})")
