"""A search over a server with every fault at once gives the answer of a search without faults."""

import hashlib
import time
from collections import Counter
from contextlib import closing

import cv2
import numpy as np
from fakes import AddressTiles, HostEncoders, Oracle
from test_tile_cache import METADATA, rows
from tile_server import Server, send

from geoengine.engine.search import SearchConfig, search
from geoengine.engine.sources import open_source
from geoengine.engine.sources.cache import STATE_TABLE, TileCache
from geoengine.engine.sources.description import CachePolicy, SourceDescription
from geoengine.engine.sources.http import HttpSource

READ_TIMEOUT_S = 0.5
FAULTS = {"server error": 0.10, "time-out": 0.05, "cut short": 0.03, "wrong type": 0.02, "busy": 0.02}


def address_png(z, x, y):
    """The tile that `AddressTiles` gives, as PNG."""
    pixels = np.array([z, x, y], np.int32).view(np.uint8).reshape(2, 2, 3)
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()


class FaultyServer(Server):
    """Fails as often as `FAULTS` says, drawn from the tile and from how often it was asked for."""

    def __init__(self):
        super().__init__()
        self.asked, self.met = Counter(), Counter()

    def answer(self, request):
        tile = tuple(map(int, request.path.strip("/").split("/")))
        with self.lock:
            attempt = self.asked[tile]
            self.asked[tile] += 1
            fault = self.fault_of(tile, attempt)
            self.met[fault] += 1
        good = address_png(*tile)
        if fault is None:
            send(request, 200, {"Content-Type": "image/png"}, good)
        elif fault == "server error":
            send(request, (500, 502, 503, 504)[attempt % 4])
        elif fault == "time-out":
            time.sleep(2 * READ_TIMEOUT_S)
        elif fault == "cut short":
            send(
                request, 200, {"Content-Length": str(len(good) if attempt % 2 else len(good) // 2)}, good[:40]
            )
        elif fault == "wrong type":
            send(request, 200, {"Content-Type": "text/html"}, b"<html>Down for maintenance</html>")
        else:
            send(request, 429, {"Retry-After": "0.05"})

    @staticmethod
    def fault_of(tile, attempt):
        digest = hashlib.sha256(f"{tile} {attempt}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "little") / 2**64
        for fault, share in FAULTS.items():
            if drawn < share:
                return fault
            drawn -= share
        return None


def located(source, k):
    oracle = Oracle()
    photos = oracle.photos([7.44], [46.95])
    return search(photos, source, HostEncoders(oracle.encode), SearchConfig(k=k))


def run(k, path):
    """Search with faults; checks the answer and the cache, and returns what was asked for and met."""
    clean = AddressTiles()
    expected = located(clean, k)
    tiles = sum(len(xy) for _, xy in clean.reads)
    with FaultyServer() as server:
        description = SourceDescription(
            template=server.address + "/{z}/{x}/{y}",
            tile_size=2,
            cache=CachePolicy.FOREVER,
            backoff_s=0.02,
            read_timeout_s=READ_TIMEOUT_S,
            concurrency=32,
        )
        with closing(HttpSource(description, TileCache(path, METADATA))) as source:
            assert located(source, k) == expected
        requests = sum(server.met.values())
        with closing(HttpSource(description, TileCache(path, METADATA))) as source:
            assert located(source, k) == expected  # from the cache
        assert sum(server.met.values()) == requests
    kept = rows(path, "SELECT zoom_level, tile_column, tile_row, tile_data FROM tiles")
    assert len(kept) == tiles
    assert all(data == address_png(z, x, 2**z - 1 - row) for z, x, row, data in kept)
    assert rows(path, f"SELECT count(*) FROM {STATE_TABLE} WHERE checksum IS NULL") == [(0,)]
    with closing(open_source(str(path))) as pack:
        assert located(pack, k) == expected
    return {"tiles": tiles, "requests": requests} | dict(server.met)


def test_a_search_through_every_fault_gives_the_answer_without_them(tmp_path):
    met = run(2, tmp_path / "cache.mbtiles")
    assert met["requests"] <= 1.3 * met["tiles"]
    for fault, share in FAULTS.items():
        assert 0.4 * share < met[fault] / met["requests"] < 2 * share
