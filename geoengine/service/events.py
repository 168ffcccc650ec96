"""Responses that end with their client: server-sent events, and answers that nobody waits for any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_ALIVE_S = 10.0
_SEND_S = 30.0
_MOST_QUEUED = 1000

T = TypeVar("T")

Tell = Callable[[str, dict[str, Any]], None]
"""(event, its data): queues an event; to be called on the event loop."""


class ClientGone(Exception):
    """The client has left before the response began."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` does, or cancel it and raise ClientGone when the client leaves.

    The request's body has been read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancelled(task, gone)


class EventStream(Response):
    """Sends the events that `produce` tells, until it ends or the client leaves; then calls `leave`."""

    def __init__(
        self, produce: Callable[[Tell], Coroutine[Any, Any, None]], leave: Callable[[], Awaitable[None]]
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._produce, self._leave = produce, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(_MOST_QUEUED)

        def tell(event: str, data: dict[str, Any]) -> None:
            text = json.dumps(data, allow_nan=False)
            with contextlib.suppress(asyncio.QueueFull):  # a client that does not read sees gaps
                queue.put_nowait(f"event: {event}\ndata: {text}\n\n".encode())

        task, gone = asyncio.ensure_future(self._produce(tell)), asyncio.ensure_future(_left(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while not gone.done() and not (task.done() and queue.empty()):
                body = await _next(queue, task, gone)
                async with asyncio.timeout(_SEND_S):  # a client that does not read holds a place in the queue
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            if not gone.done():
                task.result()
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            pass  # the connection is closed for a response that is not complete
        finally:
            await _cancelled(task, gone)
            await self._leave()


async def _next(queue: asyncio.Queue[bytes], *ends: asyncio.Future[Any]) -> bytes:
    """Return what is to be sent next, a comment that keeps the connection when there is nothing for long."""
    getting: asyncio.Future[Any] = asyncio.ensure_future(queue.get())
    done, _ = await asyncio.wait((getting, *ends), timeout=_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
    if getting in done:
        return bytes(getting.result())
    getting.cancel()
    return b"" if done else b": still here\n\n"


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
