"""Read ahead of a consumer on one background thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Iterates `produce()` on a background thread, at most `depth` items ahead of the consumer.

    Use it as a context manager. Items keep their order. An exception of the producer is raised to the
    consumer after the items before it. Leaving the block, for whatever reason, tells the producer to stop,
    closes its iterator on its own thread, and waits for the item that it is working on, unless it was left
    with `abandon`.
    """

    def __init__(self, produce: Callable[[], Iterable[T]], *, depth: int) -> None:
        self._produce = produce
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._finished = False
        self._stopped = False
        self.abandoned = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="geoengine-read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()
        if not self.abandoned:
            self._thread.join()

    def take(self, until: float | None = None) -> T:
        """Return the next item; raises StopIteration after the last one.

        Raises TimeoutError when there is none by `until`, a time of `time.monotonic`.
        """
        with self._changed:
            timeout_s = None if until is None else max(0.0, until - time.monotonic())
            if not self._changed.wait_for(lambda: self._items or self._finished, timeout_s):
                raise TimeoutError
            if not self._items:
                raise StopIteration if self._error is None else self._error
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    @property
    def waiting(self) -> bool:
        """Whether `take` would return an item at once."""
        with self._changed:
            return bool(self._items)

    def abandon(self) -> None:
        """Let leaving the block not wait for the producer, which ends with the item it is working on."""
        self.abandoned = True

    def _run(self) -> None:
        try:
            iterator = iter(self._produce())
            try:
                for item in iterator:
                    if not self._offer(item):
                        break
            finally:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
        except BaseException as error:  # handed to the consumer, whatever it is
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _offer(self, item: T) -> bool:
        """Queue an item once there is room; False when the consumer has left."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._items) < self._depth)
            if not self._stopped:
                self._items.append(item)
                self._changed.notify_all()
            return not self._stopped
