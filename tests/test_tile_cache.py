"""Tiles kept on disk: by many processes, through kills, full disks and damage."""

import email.utils
import logging
import multiprocessing
import random
import resource
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from kill_cache import METADATA, damage, kill_writer
from made_tiles import picture, read_all, tile_picture
from test_sources import write_mbtiles
from tile_server import Server

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import open_source
from geoengine.engine.sources.cache import STATE_TABLE, TileCache, used_bytes
from geoengine.engine.sources.decode import decode_tile
from geoengine.engine.sources.description import CachePolicy, SourceDescription
from geoengine.engine.sources.http import HttpSource
from geoengine.engine.sources.keeping import cache_file, keep_until, parse_size
from geoengine.engine.sources.mbtiles import IDENTITY_KEY
from geoengine.engine.sources.opening import open_server
from geoengine.engine.tiles import Tile, all_xy

FOREVER = float("inf")


@pytest.fixture
def server():
    with Server() as server:
        yield server


def described(server, **fields):
    return SourceDescription(template=server.address + "/{z}/{x}/{y}.png", **({"backoff_s": 0.01} | fields))


def rows(path, query):
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()


def fill(cache, count, *, size=8, zoom=10):
    tiles = [Tile(zoom, i, i) for i in range(count)]
    for tile in tiles:
        cache.put(tile, tile_picture(*tile, size=size), FOREVER)
    cache.flush()
    return tiles


# --- with a server -----------------------------------------------------------------------------------------


def test_a_tile_is_fetched_once(server, tmp_path):
    server.always |= {"3/1/1": 404, "3/2/2": (200, {}, b"")}
    there = [i for i in range(64) if i not in (9, 18)]
    for _ in range(2):
        cache = TileCache(tmp_path / "a.mbtiles", METADATA)
        with closing(HttpSource(described(server), cache)) as source:
            for _ in range(2):
                assert read_all(source, 3, all_xy(3)) == there
    assert len(server.requests) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mbtiles"]  # no journal is left
    with closing(open_source(str(tmp_path / "a.mbtiles"))) as kept:
        assert (kept.min_zoom, kept.max_zoom, kept.identity) == (3, 3, "of the source")
        assert read_all(kept, 3, all_xy(3)) == there
    metadata = dict(rows(tmp_path / "a.mbtiles", "SELECT name, value FROM metadata"))
    assert metadata["format"] == "png"
    assert metadata["type"] == "baselayer"


def test_the_cache_is_in_the_users_folder(server, tmp_path, monkeypatch):
    monkeypatch.delenv("GEOENGINE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TILE_KEY", "s3cret-key")
    template = (
        f"{server.address}/{{env:TILE_KEY}}/{{z}}/{{x}}/{{y}}.png?key={{env:TILE_KEY}}&token=typed-here"
    )
    description = SourceDescription(template=template, headers={"X-Key": "{env:TILE_KEY}"}, name="My tiles")
    for _ in range(2):
        with closing(open_server(description)) as source:
            assert len(read_all(source, 2, all_xy(2))) == 16
    assert len(server.requests) == 16
    [file] = (tmp_path / "home/geoengine/tiles").iterdir()
    assert file.name == f"my-tiles-{source.identity[:12]}.mbtiles"
    for secret in (b"s3cret", b"typed-here"):
        assert secret not in file.read_bytes()
    monkeypatch.setenv("GEOENGINE_CACHE", str(tmp_path / "chosen"))
    with closing(open_server(description)) as source:
        read_all(source, 0, [(0, 0)])
    assert len(list((tmp_path / "chosen").iterdir())) == 1
    monkeypatch.setenv("GEOENGINE_CACHE", "off")
    assert cache_file("a", "b") is None


def test_a_policy_of_none_keeps_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setenv("GEOENGINE_CACHE", str(tmp_path / "cache"))
    with closing(open_server(described(server, cache=CachePolicy.NONE))) as source:
        assert not source.storable
        assert len(read_all(source, 2, all_xy(2))) == len(read_all(source, 2, all_xy(2))) == 16
    assert len(server.requests) == 32
    assert not (tmp_path / "cache").exists()


def test_answers_say_how_long_they_may_be_kept():
    header, now = SourceDescription(template="https://host/{z}/{x}/{y}"), time.time()

    def kept_s(description=header, *, missing=False, **headers):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        until = keep_until(description, names, missing=missing)
        return until if until in (None, FOREVER) else round((until - now) / 10) * 10

    assert kept_s() == 7 * 86400
    assert kept_s(cache_control="public, max-age=3600") == 3600
    assert kept_s(cache_control='MAX-AGE="3600"', age="600") == 3000
    assert kept_s(cache_control="max-age=60", age="60") is None
    assert kept_s(cache_control="max-age=0") is kept_s(cache_control="no-store") is None
    assert kept_s(cache_control="no-cache, max-age=10") is None
    assert kept_s(expires=email.utils.formatdate(now + 7200)) == 7200
    assert kept_s(expires="0") is None
    assert kept_s(expires=email.utils.formatdate(now + 7200), cache_control="max-age=60") == 60
    assert kept_s(missing=True, cache_control="max-age=60") == 7 * 86400
    assert kept_s(SourceDescription(template="", missing_age_days=1), missing=True) == 86400
    assert kept_s(SourceDescription(template="", missing_age_days=0), missing=True) is None
    forever = SourceDescription(template="", cache=CachePolicy.FOREVER)
    assert kept_s(forever, cache_control="no-store") == FOREVER
    assert kept_s(SourceDescription(template="", cache=CachePolicy.NONE)) is None


def test_what_has_expired_is_fetched_again(server, tmp_path):
    server.always["1/0/0"] = (200, {"Cache-Control": "max-age=1"}, tile_picture(1, 0, 0, size=16))
    server.always["1/0/1"] = 404
    cache = TileCache(tmp_path / "a.mbtiles", METADATA)
    with closing(HttpSource(described(server, missing_age_days=1 / 86400), cache)) as source:
        read_all(source, 1, all_xy(1))
        read_all(source, 1, all_xy(1))
        assert len(server.requests) == 4
        time.sleep(1.1)
        assert read_all(source, 1, all_xy(1)) == [0, 2, 3]
    assert sorted(server.tiles_asked().values()) == [1, 1, 2, 2]


def test_what_is_damaged_in_the_cache_is_fetched_once_more(server, tmp_path):
    path = tmp_path / "a.mbtiles"

    def read():
        with closing(HttpSource(described(server), TileCache(path, METADATA))) as source:
            return read_all(source, 2, all_xy(2))

    everything = read()
    with closing(sqlite3.connect(path)) as database, database:  # other bytes than were written
        database.execute("UPDATE tiles SET tile_data = x'00' || tile_data WHERE tile_column = 1")
    with closing(TileCache(path, METADATA)) as cache:  # bytes that never were a picture
        cache.put(Tile(2, 3, 0), b"no picture", FOREVER)
    assert len(server.requests) == 16
    assert read() == everything
    assert len(server.requests) == 16 + 5
    assert read() == everything
    assert len(server.requests) == 16 + 5
    assert all(decode_tile(data) is not None for (data,) in rows(path, "SELECT tile_data FROM tiles"))


def test_what_is_wrong_is_never_kept(server, tmp_path):
    page = (200, {"Content-Type": "text/html"}, b"<html>")
    short = (200, {}, tile_picture(2, 1, 1, size=16)[:-9])
    server.always |= {"2/3/1": page, "2/3/2": short, "2/3/3": 500}
    cache = TileCache(tmp_path / "a.mbtiles", METADATA)
    with closing(HttpSource(described(server, attempts=3, concurrency=1), cache)) as source:
        assert read_all(source, 2, all_xy(2)) == list(range(13))
    for table in ("tiles", STATE_TABLE):
        assert rows(tmp_path / "a.mbtiles", f"SELECT count(*) FROM {table}") == [(13,)]


# --- limits ------------------------------------------------------------------------------------------------


def test_the_tiles_used_longest_ago_go(tmp_path, monkeypatch):
    noise = random.Random(0).randbytes
    now = time.time()
    cache = TileCache(tmp_path / "a.mbtiles", METADATA, limit_bytes=1_000_000)
    tiles = [Tile(12, i, 7) for i in range(1200)]
    for hour, tile in enumerate(tiles):
        monkeypatch.setattr(time, "time", lambda hour=hour: now + 3600 * hour)
        cache.put(tile, noise(3000), FOREVER)
        assert cache.get([tiles[0]]) or hour < 64  # which is used all the time
    cache.flush()
    left = list(cache.get(tiles))
    assert left[0] == tiles[0]
    assert left[1:] == tiles[-len(left) + 1 :]
    assert 130 < len(left) < 250
    cache.close()
    with closing(sqlite3.connect(cache.path)) as database:
        assert used_bytes(database) <= 1_000_000 + 64 * 3000
    assert cache.path.stat().st_size < 2_000_000


def test_sizes():
    assert [parse_size(text) for text in ("500MB", "4 GiB", "1.5g", "10k", "7")] == [
        500_000_000,
        4_000_000_000,
        1_500_000_000,
        10_000,
        7,
    ]
    for text in ("", "GB", "-1GB", "4 GB!"):
        with pytest.raises(SourceError, match="a size must be a number with a unit, such as 500MB"):
            parse_size(text)


# --- other files, other owners -----------------------------------------------------------------------------


def test_files_of_others_are_refused(tmp_path):
    red = {(0, 0, 0): picture("red")}
    paths = [
        write_mbtiles(tmp_path / "a.mbtiles", red),
        write_mbtiles(tmp_path / "b.mbtiles", red, **{IDENTITY_KEY: "of another"}),
        write_mbtiles(tmp_path / "c.mbtiles", red, name="mine"),
    ]
    for path in paths[1:]:
        before = path.read_bytes()
        with pytest.raises(SourceError, match="this file holds tiles of another source: give another file"):
            TileCache(path, METADATA).get([Tile(0, 0, 0)])
        assert path.read_bytes() == before


def works_without(server, cache, caplog):
    caplog.clear()
    with closing(HttpSource(described(server), cache)) as source:
        for _ in range(2):
            assert len(read_all(source, 3, all_xy(3))) == 64
    [record] = [record for record in caplog.records if record.name.startswith("geoengine")]
    assert record.levelno == logging.WARNING
    assert "the search goes on without it" in record.getMessage()
    return record.getMessage()


def test_the_search_goes_on_without_a_cache_that_cannot_be(server, tmp_path, caplog):
    (tmp_path / "file").touch()
    message = works_without(server, TileCache(tmp_path / "file/a.mbtiles", METADATA), caplog)
    assert "cannot be written" in message
    (tmp_path / "text.mbtiles").write_text("not a database, but long enough to be taken for one" * 50)
    message = works_without(server, TileCache(tmp_path / "text.mbtiles", METADATA), caplog)
    assert "file is not a database" in message
    (tmp_path / "folder.mbtiles").mkdir()
    assert "cannot be" in works_without(server, TileCache(tmp_path / "folder.mbtiles", METADATA), caplog)


def test_the_search_goes_on_when_the_disk_is_full(server, tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        cache = TileCache(tmp_path / "a.mbtiles", METADATA)
        with closing(HttpSource(described(server), cache)) as source:
            for zoom in range(5):
                assert len(read_all(source, zoom, all_xy(zoom))) == 4**zoom
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    [record] = [record for record in caplog.records if record.name.startswith("geoengine")]
    assert "cannot be written" in record.getMessage()
    assert rows(tmp_path / "a.mbtiles", "PRAGMA integrity_check") == [("ok",)]


def test_a_cache_in_a_folder_that_may_not_be_written_is_read(server, tmp_path, monkeypatch, caplog):
    path = tmp_path / "a.mbtiles"
    with closing(TileCache(path, METADATA)) as cache:
        tiles = fill(cache, 5)

    def denied(*_):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("geoengine.engine.sources.cache.open_cache", denied)
    with closing(TileCache(path, METADATA)) as cache:
        assert list(cache.get(tiles)) == tiles
        cache.put(Tile(0, 0, 0), b"data", FOREVER)
        assert not cache.writable
    assert len([record for record in caplog.records if "cannot be written" in record.getMessage()]) == 1


# --- processes ---------------------------------------------------------------------------------------------


def write_some(path, number, ready):
    cache = TileCache(path, METADATA)
    ready.wait()
    for i in range(300):
        tile = Tile(10, i, number % 3)  # some the same as another process's
        cache.put(tile, tile_picture(*tile, size=8), FOREVER)
        if i % 50 == 0:
            cache.get([Tile(10, j, 0) for j in range(i)])
    cache.close()


def test_many_processes_write_one_cache(tmp_path):
    path = tmp_path / "a.mbtiles"
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(4)
    processes = [context.Process(target=write_some, args=(path, i, ready)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows(path, "SELECT count(*) FROM tiles") == rows(path, f"SELECT count(*) FROM {STATE_TABLE}")
    with closing(open_source(str(path))) as source:
        assert len(read_all(source, 10, [(i, y) for i in range(300) for y in range(3)])) == 900


def test_a_killed_process_leaves_a_cache_without_damage(tmp_path):
    dice = random.Random(0)
    for _ in range(4):
        kill_writer(tmp_path / "a.mbtiles", dice)
        found = damage(tmp_path / "a.mbtiles")
        assert found.pop("tiles") > 0
        assert +found == {"opens": 1}
