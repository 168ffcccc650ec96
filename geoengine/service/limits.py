"""How much at once and how often: a fair, bounded queue, and a rate for each client."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from geoengine.service.problems import later

_MOST_CLIENTS = 10_000


class Rate:
    """A token bucket for each client: `per_minute` requests, a quarter of them at once; 0 is no limit."""

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_minute / 60, max(1.0, per_minute / 4), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Count a request; raises a 429 problem when there were too many."""
        if not self._per_s:
            return
        now = self._clock()
        tokens, since = self._buckets.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._per_s)
        self._buckets[client] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)  # who asked least recently has a full bucket again anyway
        if tokens < 1:
            raise later(429, "too many requests: slow down, and try again later", (1 - tokens) / self._per_s)


class Admission:
    """Lets `searching` requests search at once, all clients in turn, and `waiting` more wait.

    `mean_s` estimates how long one takes, for `Retry-After`.
    """

    def __init__(self, searching: int, waiting: int, per_client: int) -> None:
        self._most, self._room, self._per_client = searching, searching + waiting, per_client
        self._held: dict[str, int] = {}
        self._queues: OrderedDict[str, deque[tuple[asyncio.Future[None], Callable[[int], None]]]]
        self._queues = OrderedDict()
        self.searching = 0
        self.mean_s = 1.0

    @property
    def held(self) -> int:
        """Requests that have a place."""
        return sum(self._held.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(len(queue) for queue in self._queues.values())

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """Hold a place in the queue; a problem (503) when it is full, or (429) full of the client's own."""
        if self.held >= self._room:
            raise later(503, "the service is busy: try again later", self._wait_s())
        if self._held.get(client, 0) >= self._per_client:
            raise later(429, "you have too many requests under way: wait for them first", self._wait_s())
        self._held[client] = self._held.get(client, 0) + 1
        try:
            yield
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]

    def timed(self, seconds: float) -> None:
        """Hear of how long a search took."""
        self.mean_s += 0.1 * (seconds - self.mean_s)

    async def wait(self, client: str, timeout_s: float, moved: Callable[[int], None]) -> None:
        """Wait for a turn, which `done` ends; `moved` hears of how many come before, whenever that changes.

        Raises a 503 problem when it does not come in time.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (turn, moved)
        self._queues.setdefault(client, deque()).append(entry)
        self._grant()
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.done()  # it came in the same moment
            self._leave(client, entry)
            if isinstance(error, TimeoutError):
                raise later(503, "the service is busy: try again later", self._wait_s()) from None
            raise

    def done(self) -> None:
        """End a turn."""
        self.searching -= 1
        self._grant()

    def _grant(self) -> None:
        while self.searching < self._most and self._queues:
            client, queue = self._queues.popitem(last=False)
            turn, _ = queue.popleft()
            if queue:
                self._queues[client] = queue
            if not turn.done():
                self.searching += 1
                turn.set_result(None)
        self._tell()

    def _leave(self, client: str, entry: tuple[asyncio.Future[None], Callable[[int], None]]) -> None:
        queue = self._queues.get(client)
        if queue is not None and entry in queue:
            queue.remove(entry)
            if not queue:
                del self._queues[client]
            self._tell()

    def _tell(self) -> None:
        """Tell those who wait how many come before them: each client in turn gives one request."""
        queues, before = [list(queue) for queue in self._queues.values()], 0
        for depth in range(max(map(len, queues), default=0)):
            for queue in queues:
                if depth < len(queue):
                    queue[depth][1](before)
                    before += 1

    def _wait_s(self) -> float:
        return min(60.0, self.mean_s * (self.waiting + self._most) / self._most)
