"""One worker process: `python -m geoengine.service.worker`, started by the supervisor.

Its settings come as the first line of stdin, whose end means that the supervisor is gone. The listening
socket is inherited; "ready" goes to stdout, and the log to stderr.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from geoengine.commands.terminal import Exit, complain
from geoengine.engine.errors import GeoEngineError
from geoengine.service.app import create_app
from geoengine.service.settings import Settings

_SILENT_S = 20.0  # a connection that brings no whole request head, or does not stop sending
_MOST_CONNECTIONS = 512
_STOP_S = 10


class Protocol(H11Protocol):
    """HTTP/1.1 that closes connections whose client does not get to the point."""

    _timer: asyncio.TimerHandle | None = None
    _answered: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(_SILENT_S, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """End waiting."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; a response that is being made to what came before it is dropped."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _check(self) -> None:
        """Close the connection if no request has begun since the last time.

        While a response is being made, other limits hold.
        """
        if self.cycle is self._answered:
            self.transport.close()
            return
        if self.cycle.response_complete:
            self._answered = self.cycle
        self._timer = self.loop.call_later(_SILENT_S, self._check)


class _Server(uvicorn.Server):
    """Tells the supervisor when it takes requests."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print("ready", flush=True)


def server_config(app: Any) -> uvicorn.Config:  # noqa: ANN401 - an ASGI application
    """Return how an application is served."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_STOP_S,
    )


def main() -> None:
    """Serve until told to stop; exits with status 2 and a sentence when the service cannot start."""
    settings = Settings.from_json(sys.stdin.readline())
    listening = socket.socket(fileno=int(sys.argv[1]))
    _log_to_stderr()
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    try:
        app = create_app(settings)
    except GeoEngineError as error:
        complain(str(error))
        raise SystemExit(Exit.FAILED) from None
    _Server(server_config(app)).run(sockets=[listening])


def _end_with_supervisor() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
