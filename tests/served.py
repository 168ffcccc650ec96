"""A service in this process, on a free port, with an encoder that tests can hold up or make fail."""

import contextlib
import json
import socket
import threading
import time

import cv2
import httpx
import uvicorn

from geoengine.engine.engine import GeoEngine
from geoengine.engine.index.known_rows import KnownRows
from geoengine.engine.index.memory_rows import MemoryRows
from geoengine.engine.sources import planet
from geoengine.service import locator as locator_module
from geoengine.service.app import create_app
from geoengine.service.settings import Settings
from geoengine.service.worker import server_config

OPEN, INIT = GeoEngine.open, locator_module.Locator.__init__  # a service may run while another one starts
LATEST_S = 20
SMALL = {"levels": "4-8", "k": "2", "within": "0,0,60,60"}


class Backend:
    """A backend that waits while it is held, and fails while it is told to."""

    def __init__(self, backend):
        self.backend = backend
        self.go_on, self.error = threading.Event(), None
        self.go_on.set()
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_mixed(self, groups):
        self.calls += 1
        assert self.go_on.wait(LATEST_S)
        if self.error is not None:
            raise self.error
        return self.backend.encode_mixed(groups)

    def encode(self, encoder, pixels):
        return self.encode_mixed([(encoder, pixels)])[0]


class Served:
    """A running service: `client` asks it, `backend` is its encoder, `ended` its exit status."""

    def __init__(self, url, backend, ended, locator):
        self.url, self.backend, self.ended, self.locator = url, backend, ended, locator
        self.client = httpx.Client(base_url=url, timeout=LATEST_S)

    def locate(self, photo, **options):
        params = SMALL | options.pop("params", {})
        headers = {"Content-Type": "image/jpeg"} | options.pop("headers", {})
        return self.client.post("/v1/locate", content=photo, params=params, headers=headers, **options)

    def forget(self):
        """Forget the embeddings of tiles, so that the next search needs the encoder."""
        engine = self.locator.engine
        engine.known = KnownRows(engine.bundle.embed_dim, None, MemoryRows(engine.bundle.embed_dim, 1 << 24))
        self.locator.shared._known.clear()

    def until(self, condition):
        end = time.monotonic() + LATEST_S
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)


@contextlib.contextmanager
def served(monkeypatch, **settings):
    """Run a service of the planet; yields a `Served`."""
    made, ended, locators = [], [], []

    def open_engine(*args, **options):
        engine = OPEN("planet", backend="onnxruntime-cpu", threads=2)
        made.append(Backend(engine.backend))
        engine.backend = made[0]
        return engine

    def noted(self, *args):
        INIT(self, *args)
        locators.append(self)

    monkeypatch.setattr(GeoEngine, "open", open_engine)
    monkeypatch.setattr(locator_module.Locator, "__init__", noted)
    app = create_app(Settings(**{"rate_per_minute": 0, "rows_mb": 16} | settings), end=ended.append)
    with listening(app) as url:
        running = Served(url, made[0], ended, locators[0])
        try:
            yield running
        finally:
            running.backend.go_on.set()
            running.client.close()


@contextlib.contextmanager
def listening(app):
    """Run an ASGI application in a thread, on a free port; yields its address."""
    server = uvicorn.Server(server_config(app))
    port = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
    thread.start()
    try:
        end = time.monotonic() + LATEST_S
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end, "the service does not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(LATEST_S)
        port.close()
        assert not thread.is_alive()


def events(response):
    """(event, data) of a stream of server-sent events."""
    found = []
    for block in response.read().decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def is_problem(response, status):
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["request"]) == (status, response.headers["X-Request-ID"])
    assert "\n" not in body["detail"] and len(body["detail"]) < 300
    if status in (429, 503):
        assert 1 <= int(response.headers["Retry-After"]) <= 120
    return body["detail"]


def photo_of_the_planet():
    """A photo's file."""
    return cv2.imencode(".jpg", planet.photo(41.9, 12.5, 3)[:, :, ::-1])[1].tobytes()
