"""PMTiles archives on a web server."""

import time
from contextlib import closing

import numpy as np
import pytest
from made_tiles import check_small_world, read_all, tile_picture
from test_pmtiles_source import write_pmtiles, write_with_leaves
from tile_server import Server

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import open_source
from geoengine.engine.tiles import Tile, all_xy, descendants_xy


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("GEOENGINE_CACHE", str(tmp_path / "cache"))
    with Server() as server:
        yield server


@pytest.fixture
def world(tmp_path, server):
    tiles = {
        (z, x, y): tile_picture(z, x, y, size=32) for z in (3, 4) for x in range(2**z) for y in range(2**z)
    }
    path = write_pmtiles(tmp_path / "world.pmtiles", tiles, metadata={"name": "world.pmtiles"})
    server.files["/world.pmtiles"] = path.read_bytes()
    return f"{server.address}/world.pmtiles?key=typed-secret"


def test_every_tile_once_in_its_place(server, world, tmp_path):
    with closing(open_source(world)) as source:
        check_small_world(source, "world.pmtiles")
        with closing(open_source(str(tmp_path / "world.pmtiles"))) as local:
            assert source.identity == local.identity
    assert len(server.requests) < 20  # of which 260 tiles came


def test_children_of_a_tile_come_with_one_request(server, tmp_path, monkeypatch):
    monkeypatch.setenv("GEOENGINE_CACHE", "off")
    path = write_with_leaves(tmp_path / "a.pmtiles")
    server.files["/a.pmtiles"] = path.read_bytes()
    with closing(open_source(f"{server.address}/a.pmtiles")) as source:
        asked = descendants_xy([(10, 9), (30, 1)], 5, 7)
        assert read_all(source, 7, asked, tolerance=4) == list(range(32))
        before = len(server.requests)
        assert read_all(source, 7, asked, tolerance=4) == list(range(32))
        assert len(server.requests) - before == 2


def test_a_tile_is_fetched_once(server, world, tmp_path):
    for _ in range(2):
        with closing(open_source(world)) as source:
            assert read_all(source, 4, all_xy(4)) == list(range(256))
        asked = [request.headers["Range"] for request in server.requests]
        server.requests.clear()
    assert asked == ["bytes=0-16383"]
    [file] = (tmp_path / "cache").iterdir()
    assert b"typed-secret" not in file.read_bytes()
    with closing(open_source(str(file))) as kept:
        assert kept.identity == source.identity
        assert read_all(kept, 4, all_xy(4)) == list(range(256))


def test_a_tile_that_does_not_decode_is_fetched_once_more(server, tmp_path):
    tiles = {(5, x, y): tile_picture(5, x, y, size=32, kind="JPEG") for x in range(32) for y in range(32)}
    path = write_pmtiles(tmp_path / "a.pmtiles", tiles, metadata={"name": "a"})
    whole = server.files["/a.pmtiles"] = path.read_bytes()
    with closing(open_source(f"{server.address}/a.pmtiles")) as source:
        offset, length = source.place_of(5, 16, 16)
        assert offset > 16 << 10
        damaged = (206, {"Content-Range": f"bytes 0-0/{len(whole)}"}, b"\xff\xd8" + bytes(length - 2))
        server.faults["a"] = [damaged]
        assert read_all(source, 5, [(16, 16)], tolerance=4) == [0]
        server.faults["a"] = [damaged, damaged]
        assert read_all(source, 5, [(16, 17)], tolerance=4) == []
        asked = len(server.requests)
        assert read_all(source, 5, [(16, 16), (16, 17)], tolerance=4) == [0, 1]  # nothing wrong was kept
        assert len(server.requests) == asked + 1


def test_what_the_cache_has_of_no_picture_is_fetched_again(server, world, tmp_path):
    with closing(open_source(world)) as source:
        assert read_all(source, 4, [(3, 3)]) == [0]
        source._cache.put(Tile(4, 3, 3), b"no picture", time.time() + 1000)
    with closing(open_source(world)) as source:
        asked = len(server.requests)
        assert read_all(source, 4, [(3, 3)]) == [0]
        assert len(server.requests) <= asked + 1
        assert read_all(source, 4, [(3, 3)]) == [0]
        assert source._cache.get([Tile(4, 3, 3)])[Tile(4, 3, 3)].data != b"no picture"


def test_faults_that_pass_are_tried_again(server, world):
    with closing(open_source(world)) as source:
        server.faults["world"] = [500, (206, {}, b"short")]
        assert read_all(source, 4, [(1, 1)]) == [0]
        assert server.faults["world"] == []


def test_servers_and_files_that_will_not_do(server, world):
    whole = server.files["/world.pmtiles"]
    for fault, message in (
        ((200, {}, whole), "the server does not answer range requests; download the file first"),
        (404, r"there is no such file \(HTTP 404\)"),
        ((206, {}, b"no archive" * 99), "this is no PMTiles file"),
    ):
        server.always["world"] = fault
        with pytest.raises(SourceError, match=message) as caught:
            open_source(world)
        assert "typed-secret" not in str(caught.value)
    server.always.clear()
    server.files["/world.pmtiles"] = whole[: len(whole) // 2]
    with closing(open_source(world)) as source, pytest.raises(SourceError, match="this file is cut short"):
        list(source.read(4, all_xy(4)))


def test_it_can_be_left_and_closed(world):
    source = open_source(world)
    batches = source.read(4, all_xy(4))
    assert np.unique(next(batches).positions).size
    batches.close()
    source.close()
    source.close()
