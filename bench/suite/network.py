"""A tile server on this machine that answers after a fixed time, and its tiles as the engine fetches them."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.suite.workload import POOL_ZOOM, TILE_SIDE, marked, pool_xy
from geoengine.engine.errors import SourceError
from geoengine.engine.sources import TileBatch
from geoengine.engine.sources.description import SourceDescription
from geoengine.engine.sources.http import HttpSource
from geoengine.engine.sources.mbtiles import MBTilesSource
from geoengine.engine.tiles import all_xy

CONNECTIONS = 32
"""Requests under way at a time; most servers allow as many."""

_MAX_ZOOM = 18


class ServedTiles:
    """The tiles of `serving(pool_bodies(…))`, fetched by the engine's own client without its cache.

    They are the pictures of `PooledTiles`, marked after they have arrived.
    """

    attribution, storable = "", True
    min_zoom, max_zoom = 0, _MAX_ZOOM

    def __init__(self, port: int, world: str) -> None:
        template = f"http://127.0.0.1:{port}/{{z}}/{{x}}/{{y}}.jpg"
        self.world = world
        self._source = HttpSource(
            SourceDescription(
                template=template, concurrency=CONNECTIONS, tile_size=TILE_SIDE, max_zoom=_MAX_ZOOM
            )
        )
        self.name, self.identity = self._source.name, self._source.identity
        self.tile_size, self.bounds = self._source.tile_size, self._source.bounds

    def read(self, z: int, xy: NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the pictures of the tiles."""
        for batch in self._source.read(z, xy):
            yield TileBatch(batch.positions, marked(batch.pixels, z, xy[batch.positions]))

    def close(self) -> None:
        """Close the connections."""
        self._source.close()


def pool_bodies(pool: Path) -> list[bytes]:
    """Return the files of all pictures of a pool, in the order of `all_xy`."""
    with closing(MBTilesSource(pool)) as source:
        tiles = [source.tile_data(POOL_ZOOM, x, y) for x, y in all_xy(POOL_ZOOM).tolist()]
    return [tile for tile in tiles if isinstance(tile, bytes)]


@contextmanager
def deaf() -> Iterator[None]:
    """Let processes that the block starts ignore Ctrl-C, from their first moment; in the main thread only.

    It reaches all processes of a terminal at once, and this one tells the others when to stop.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a process hands down
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def serving(bodies: Sequence[bytes], latency_ms: float) -> Iterator[int]:
    """Run a server in a process of its own while the block runs; yields its port.

    It answers GET /z/x/y.jpg `latency_ms` after the request came: with the only one of `bodies`, or with the
    picture of the pool that stands for the tile. It ends with this process, however that ends. Raises
    SourceError when it does not come up.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(list(bodies), latency_ms / 1e3, theirs), daemon=True)
    with deaf():
        server.start()
    theirs.close()
    try:
        try:
            port = int(ours.recv())
        except EOFError:
            raise SourceError("the server of the benchmark's tiles ended before it served any") from None
        yield port
    finally:
        ours.close()
        server.join(5)
        server.terminate()
        server.join()


def _serve(bodies: Sequence[bytes], latency_s: float, pipe: Connection) -> None:
    """Serve until the other end of the pipe is gone; sends the port first."""

    def answer(request: bytes) -> bytes:
        body = bodies[0] if len(bodies) == 1 else bodies[_number(request)]
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport, self.received = transport, b""

        def data_received(self, data: bytes) -> None:
            self.received += data
            while b"\r\n\r\n" in self.received:
                request, _, self.received = self.received.partition(b"\r\n\r\n")
                asyncio.get_running_loop().call_later(latency_s, self.transport.write, answer(request))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Protocol, "127.0.0.1", 0, backlog=256)
        gone = asyncio.Event()
        loop.add_reader(pipe.fileno(), gone.set)
        pipe.send(server.sockets[0].getsockname()[1])
        await gone.wait()

    asyncio.run(run())


def _number(request: bytes) -> int:
    """Return which picture of the pool a request "GET /z/x/y.jpg …" is answered with."""
    z, x, y = map(int, request.split(b" ", 2)[1].removesuffix(b".jpg").strip(b"/").split(b"/"))
    [[column, row]] = pool_xy(z, np.array([[x, y]])).tolist()
    return int(column) << POOL_ZOOM | int(row)
