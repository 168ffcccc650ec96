"""Keeps one worker running: it holds the listening socket, and replaces a worker that is gone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from geoengine.engine.errors import GeoEngineError
from geoengine.service.settings import Settings

_BACKLOG = 512
_STEADY_S = 10.0  # a worker that has run for so long is replaced at once when it ends
_LONGEST_PAUSE_S = 30.0
_STOP_S = 15.0

_log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises GeoEngineError when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise GeoEngineError(f"--host {host}: there is no such address ({error.strerror})") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise GeoEngineError(
            f"cannot listen on {host}, port {port} ({error.strerror}): choose another --port"
        ) from None
    return listening


class Supervisor:
    """Starts a worker, and another one whenever it ends, until `stop`.

    While there is none, connections wait in the socket's queue. `ready` is called when the first worker takes
    requests.
    """

    def __init__(self, settings: Settings, listening: socket.socket, ready: Callable[[], None]) -> None:
        self._settings, self._listening, self._ready = settings, listening, ready
        self._worker: subprocess.Popen[str] | None = None
        self._stopping = threading.Event()

    def run(self) -> int:
        """Supervise; returns the exit status: 0 after `stop`, else that of a worker that could not start."""
        pause_s, first = 0.0, True
        while not self._stopping.wait(pause_s):
            start = time.monotonic()
            worker = self._start()
            if worker.stdout is not None and worker.stdout.readline().strip() == "ready" and first:
                first = False
                self._ready()
            status = worker.wait()
            if self._stopping.is_set():
                break
            if first:
                return status if status > 0 else 1
            steady = time.monotonic() - start > _STEADY_S
            pause_s = 0.0 if steady else min(_LONGEST_PAUSE_S, 2 * pause_s + 0.25)
            _log.error("the worker has ended (status %d): another one is started", status)
        return 0

    def stop(self, signum: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """End the worker in good order, and then `run`; a signal handler."""
        del signum, frame
        self._stopping.set()
        worker = self._worker
        if worker is not None and worker.poll() is None:
            worker.terminate()
            killer = threading.Timer(_STOP_S, worker.kill)
            killer.daemon = True
            killer.start()

    def _start(self) -> subprocess.Popen[str]:
        descriptor = self._listening.fileno()
        # -P: a folder of the same name where the service is started must not hide the package.
        command = (sys.executable, "-P", "-m", "geoengine.service.worker", str(descriptor))
        self._worker = worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(descriptor,),
            process_group=0,  # Ctrl-C is the supervisor's to hand on
        )
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended at once; its status says so
            worker.stdin.write(self._settings.to_json() + "\n")
            worker.stdin.flush()
        if self._stopping.is_set():  # while it was being started
            worker.terminate()
        return worker


def supervise(settings: Settings, announce: Callable[[str], None]) -> int:
    """Listen, keep a worker running, and return the exit status; ends on SIGINT and SIGTERM."""
    with listen(settings.host, settings.port) as listening:
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        supervisor = Supervisor(settings, listening, lambda: announce(f"serving on http://{shown}:{port}"))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, supervisor.stop)
        os.environ.setdefault("MALLOC_ARENA_MAX", "4")  # of glibc: many threads, and memory that comes back
        return supervisor.run()
