"""One search's face of encoders that many searches share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import Backend, EmbeddingRows
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.manifest import Variant
from geoengine.kernels import cosine_topk


class SearchEndedError(GeoEngineError):
    """A search was cancelled, or did not end in time."""


class Queue(Protocol):
    """What takes pictures for a backend; see `SharedEncoders`."""

    @property
    def backend(self) -> Backend:
        """What encodes in the end."""
        ...

    @property
    def changed(self) -> threading.Condition:
        """The lock around all that searches share; tells of embeddings that have come."""
        ...

    def submit(
        self, rows: SharedRows, encoder: str, pixels: NDArray[np.uint8], digests: Sequence[bytes]
    ) -> None:
        """Queue pictures for consecutive rows; waits while the search has too many in the queue."""
        ...


class SharedSearch:
    """The encoders of one search; a `Backend`, closing which ends the search.

    All waiting ends at `until`, or when `cancel` is called from another thread, with SearchEndedError.
    """

    def __init__(self, shared: Queue, client: str, until: float | None) -> None:
        self._shared, self.client, self._until = shared, client, until
        self.queued = 0
        self.error: GeoEngineError | None = None

    @property
    def name(self) -> str:
        """What executes; see `Backend`."""
        return self._shared.backend.name

    @property
    def variant(self) -> Variant:
        """Which of the bundle's graphs are executed."""
        return self._shared.backend.variant

    @property
    def batch(self) -> int:
        """How many pictures in one call suit it best."""
        return self._shared.backend.batch

    @property
    def max_batch(self) -> int:
        """The most pictures that a graph ever runs at once."""
        return self._shared.backend.max_batch

    def encode(self, encoder: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the unit embeddings, float32[n, d], of uint8[n, S, S, 3] pictures; see `Backend`."""
        [embeddings] = self.encode_mixed([(encoder, pixels)])
        return embeddings

    def encode_mixed(self, groups: Sequence[tuple[str, NDArray[np.uint8]]]) -> list[NDArray[np.float32]]:
        """Return what `encode` gives for each group; see `Backend`."""
        taken = [(self.rows(encoder, len(pixels)), pixels) for encoder, pixels in groups]
        for rows, pixels in taken:
            rows.append(pixels)
        return [rows.download() for rows, _ in taken]

    def rows(self, encoder: str, capacity: int) -> EmbeddingRows:
        """Return room for the embeddings of `capacity` pictures of one encoder."""
        return SharedRows(self, self._shared, encoder, capacity)

    def cancel(self, reason: str) -> None:
        """End the search: what waits for it, or is called next, raises SearchEndedError with the reason."""
        with self._shared.changed:
            self.end(SearchEndedError(reason))
            self._shared.changed.notify_all()

    def close(self) -> None:
        """End the search; the backend stays open for the others."""
        self.cancel("the search is closed")

    def check(self) -> None:
        """Raise what ended the search, if something did; to be called now and then while tiles are read."""
        if self._until is not None and time.monotonic() >= self._until:
            with self._shared.changed:
                self.end(SearchEndedError("the search did not end in time"))
        if self.error is not None:
            raise self.error.with_traceback(None)

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait, with the lock held, until `done`; raises what ends the search before."""
        left_s = None if self._until is None else max(0.0, self._until - time.monotonic())
        self._shared.changed.wait_for(lambda: done() or self.error is not None, left_s)
        self.check()

    def end(self, error: GeoEngineError) -> None:
        """Note why the search ends, the first reason only; the lock is held."""
        if self.error is None:
            self.error = error


class SharedRows:
    """The embeddings of some pictures of a search, in ordinary memory; see `EmbeddingRows`."""

    def __init__(self, search: SharedSearch, shared: Queue, encoder: str, capacity: int) -> None:
        self.search, self._shared = search, shared
        self._encoder, self._capacity = encoder, capacity
        self._embeddings = np.empty((0, 0), dtype=np.float32)
        self.count = self.left = 0  # rows, and those of them that have not come yet

    def append(self, pixels: NDArray[np.uint8], digests: Sequence[bytes] = ()) -> None:
        """Queue uint8[n, S, S, 3] pictures, whose embeddings become the next n rows."""
        if self.count + len(pixels) > self._capacity:
            raise ValueError(
                f"there is room for {self._capacity} embeddings, got {self.count} and {len(pixels)} more"
            )
        self._shared.submit(self, self._encoder, pixels, digests)

    def fill(self, place: int, embedding: NDArray[np.float32]) -> None:
        """Put an embedding that has come in its place; the lock is held."""
        if not len(self._embeddings):
            self._embeddings = np.empty((self._capacity, len(embedding)), dtype=np.float32)
        self._embeddings[place] = embedding
        self.left -= 1

    def download(self) -> NDArray[np.float32]:
        """Wait for all rows that were appended and return them, float32[n, d]."""
        with self._shared.changed:
            self.search.wait(lambda: not self.left)
        return self._embeddings[: self.count]

    def top_k(
        self, queries: NDArray[np.float32], k: int, rows: NDArray[np.int64], segments: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Score each query against its own rows, best first; see `EmbeddingRows`."""
        return cosine_topk(self.download(), queries, k, rows=rows, segments=segments)
