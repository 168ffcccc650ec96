"""How close fetching tiles comes to what the connections allow: `python -m geoengine.bench.fetching`.

A server on this machine answers each request after a fixed time, so 32 connections that wait 30 ms each can
carry 32 / 0.03 = 1067 tiles a second. Fetching, checking and decoding must not keep them waiting. A round of
the plainest possible client, bare sockets that decode nothing, before each round of the tile source shows
what the machine and the server allow.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import threading
import time
from contextlib import closing

import numpy as np

from geoengine.bench.suite.network import serving
from geoengine.engine.sources.decoders import made_tile


def fetch_plainly(port: int, connections: int, tiles: int) -> float:
    """Fetch tiles over bare sockets, one thread each, and return tiles a second."""
    left = iter(range(tiles))
    lock = threading.Lock()

    def run() -> None:
        with closing(socket.create_connection(("127.0.0.1", port))) as connection:
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                connection.sendall(b"GET /0/0/0.jpg HTTP/1.1\r\nHost: localhost\r\n\r\n")
                received = connection.recv(1 << 16)
                head, _, body = received.partition(b"\r\n\r\n")
                missing = int(head.lower().partition(b"content-length: ")[2].split()[0]) - len(body)
                while missing > 0:
                    missing -= len(connection.recv(1 << 16))

    threads = [threading.Thread(target=run) for _ in range(connections)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tiles / (time.perf_counter() - start)


def fetch_with_source(port: int, connections: int, tiles: int) -> float:
    """Fetch and decode tiles with the tile source, and return tiles a second; connections are made before."""
    from geoengine.engine.sources.description import SourceDescription
    from geoengine.engine.sources.http import HttpSource

    template = f"http://127.0.0.1:{port}/{{z}}/{{x}}/{{y}}.jpg"
    addresses = np.stack([np.arange(tiles), np.arange(tiles)], axis=1)
    with closing(HttpSource(SourceDescription(template=template, concurrency=connections))) as source:
        for _ in source.read(20, addresses[: 2 * connections]):
            pass
        start = time.perf_counter()
        got = sum(len(batch.positions) for batch in source.read(20, addresses))
        seconds = time.perf_counter() - start
    assert got == tiles, f"{tiles - got} of {tiles} tiles did not come"
    return tiles / seconds


def main() -> None:
    """Measure in interleaved rounds and print medians, as one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--tiles", type=int, default=1792)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    plain, source = [], []
    with serving([made_tile()], options.latency_ms) as port:
        for number in range(options.rounds):
            plain.append(fetch_plainly(port, options.connections, options.tiles))
            source.append(fetch_with_source(port, options.connections, options.tiles))
            print(f"round {number + 1}: plain {plain[-1]:.0f}/s, source {source[-1]:.0f}/s", file=sys.stderr)
    ideal = 1e3 * options.connections / options.latency_ms
    result = {
        "ideal_tiles_per_s": round(ideal, 1),
        "plain_tiles_per_s": round(statistics.median(plain), 1),
        "source_tiles_per_s": round(statistics.median(source), 1),
        "share_of_ideal": round(statistics.median(source) / ideal, 3),
        "share_of_plain": round(statistics.median(a / b for a, b in zip(source, plain, strict=True)), 3),
    } | vars(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
