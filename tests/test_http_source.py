"""Tiles from a web server, and every fault that servers and networks have."""

import hashlib
import logging
import socket
import threading
import time
from contextlib import closing, contextmanager
from importlib.metadata import version

import numpy as np
import pytest
from made_tiles import colour_of, picture, read_all, tile_picture
from tile_server import Server

from geoengine.engine.errors import SourceError, TileError
from geoengine.engine.sources import open_source
from geoengine.engine.sources.description import SourceDescription
from geoengine.engine.sources.http import HttpSource
from geoengine.engine.tiles import LngLatBbox, Tile, all_xy, quadkey, tms_row, xy_in_bbox


@pytest.fixture
def server():
    with Server() as server:
        yield server


@contextmanager
def http_source(server, path="/{z}/{x}/{y}.png", *, cache=None, **fields):
    fields = {"backoff_s": 0.01, "attempts": 3, "read_timeout_s": 5.0} | fields
    with closing(HttpSource(SourceDescription(template=server.address + path, **fields), cache)) as source:
        yield source


def test_http_gives_every_tile_once_in_its_place(server):
    with http_source(server) as source:
        assert (source.world, source.attribution, source.tile_size) == ("earth", "", 256)
        assert source.name == f"{server.address}/{{z}}/{{x}}/{{y}}.png"
        assert read_all(source, 4, all_xy(4)) == list(range(256))
        assert source.tile_size == 16
    assert set(server.tiles_asked().values()) == {1}


@pytest.mark.parametrize("fault", [204, 404, 410, (200, {}, b"")])
def test_http_tiles_that_do_not_exist_are_missing(server, fault):
    server.always["2/1/1"] = fault
    with http_source(server) as source:
        assert read_all(source, 2, [(0, 0), (1, 1), (2, 2)]) == [0, 2]
    assert len(server.requests) == 3


def cut_off(request):
    body = tile_picture(2, 1, 1, size=16)
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body[:20])


def hang_up(request):
    request.connection.close()


PAGE = (200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
UNTYPED_PAGE = (200, {}, b"  <html>Please log in</html>")
OTHER_TYPE = (200, {"Content-Type": "application/json"}, tile_picture(2, 1, 1, size=16))
SHORT = (200, {"Content-Type": "image/png"}, tile_picture(2, 1, 1, size=16)[:-9])


@pytest.mark.parametrize(
    "fault", [429, 500, 502, 503, 504, 408, cut_off, hang_up, PAGE, UNTYPED_PAGE, OTHER_TYPE]
)
def test_http_faults_that_pass_are_tried_again(server, fault):
    server.faults["2/1/1"] = [fault, fault]
    with http_source(server) as source:
        assert read_all(source, 2, all_xy(2)) == list(range(16))
    assert server.tiles_asked()["/2/1/1.png"] == 3


def test_http_a_picture_that_does_not_decode_is_asked_for_once_more(server):
    server.faults["2/1/1"] = [SHORT]
    server.always["2/2/2"] = SHORT
    with http_source(server) as source:
        assert read_all(source, 2, all_xy(2)) == [i for i in range(16) if i != 10]
    assert server.tiles_asked()["/2/1/1.png"] == server.tiles_asked()["/2/2/2.png"] == 2


def test_http_pages_of_some_tiles_mean_that_there_are_no_pictures(server):
    server.always["2/1/1"] = PAGE
    with http_source(server, concurrency=1) as source:
        assert read_all(source, 2, all_xy(2)) == [i for i in range(16) if i != 5]
    assert server.tiles_asked()["/2/1/1.png"] == 3


def test_http_a_server_that_sends_pages_only_is_an_error(server):
    server.always["*"] = PAGE
    message = "the server fails: it sent a page of text in place of a picture, 3 times, when asked for"
    with http_source(server, attempts=8) as source, pytest.raises(SourceError, match=message):
        read_all(source, 2, all_xy(2))


@pytest.mark.parametrize("kind", ["application/vnd.mapbox-vector-tile", "application/x-protobuf"])
def test_http_vector_tiles_are_refused(server, kind):
    server.always["*"] = (200, {"Content-Type": kind}, b"\x1a\x08vector tile")
    with (
        http_source(server) as source,
        pytest.raises(SourceError, match="sends vector tiles, but pictures are needed"),
    ):
        read_all(source, 2, all_xy(2))


def test_http_placeholders_for_missing_imagery_are_missing(server):
    grey = picture("grey")
    server.always["2/1/1"] = (200, {"Content-Type": "image/png"}, grey)
    with http_source(server, placeholders=(hashlib.sha256(grey).hexdigest(),)) as source:
        assert read_all(source, 2, all_xy(2)) == [i for i in range(16) if i != 5]
    assert server.tiles_asked()["/2/1/1.png"] == 1


def test_http_waits_as_long_as_retry_after_says(server):
    server.faults["2/1/1"] = [(429, {"Retry-After": "0.3"}, b"")]
    server.faults["2/1/2"] = [(503, {"Retry-After": "nonsense"}, b"")]
    server.faults["2/1/3"] = [(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"")]
    with http_source(server) as source:
        begin = time.monotonic()
        assert read_all(source, 2, [(1, 2), (1, 3)]) == [0, 1]
        middle = time.monotonic()
        assert read_all(source, 2, [(1, 1)]) == [0]
        assert time.monotonic() - middle >= 0.3
        assert middle - begin < 0.3


def test_http_does_not_wait_longer_than_it_may(server):
    server.always["*"] = (429, {"Retry-After": "3600"}, b"")
    with (
        http_source(server) as source,
        pytest.raises(SourceError, match="the server asks to wait for 3600 s"),
    ):
        read_all(source, 2, all_xy(2))


def test_http_server_that_always_fails(server):
    server.always["*"] = 500
    with http_source(server) as source:
        message = r"the server fails: it answered HTTP 500, 3 times, when asked for tile 4/\d+/\d+"
        with pytest.raises(SourceError, match=message):
            read_all(source, 4, all_xy(4))
        assert len(server.requests) < 3 * 64  # it gave up early
        with pytest.raises(SourceError, match=message):
            read_all(source, 4, [(1, 1), (1, 2)])


def test_http_a_busy_server_is_left_alone_by_every_thread(server):
    busy = (429, {"Retry-After": "0.4"}, b"")
    server.faults["3/0/0"] = [busy]
    with http_source(server, concurrency=4) as source:
        assert len(read_all(source, 3, all_xy(3))) == 64
    # Those that were under way when the server said so, and none in the pause.
    assert sum(server.times[0] <= t < server.times[0] + 0.35 for t in server.times) <= 8


def test_http_keeps_to_the_rate_of_the_host(server):
    with http_source(server, rate_per_s=100.0) as first, http_source(server, rate_per_s=100.0) as second:
        begin = time.monotonic()
        read_all(first, 2, all_xy(2))
        read_all(second, 2, all_xy(2))
        assert time.monotonic() - begin >= 0.3
    assert len(server.requests) == 32


def test_http_a_tile_that_always_fails_is_missing_with_one_warning(server, caplog):
    server.always["3/1/1"] = server.always["3/2/2"] = 500
    with http_source(server) as source:
        assert len(read_all(source, 3, all_xy(3))) == 62
    (record,) = [record for record in caplog.records if record.name.startswith("geoengine")]
    assert record.levelno == logging.WARNING
    assert (
        "2 tiles count as missing: it answered HTTP 500, 3 times, when asked for tile 3/"
        in record.getMessage()
    )


def test_http_failures_between_answers_do_not_end_the_search(server):
    for x in range(8):
        for y in (1, 5):
            server.always[f"3/{x}/{y}"] = 500
    with http_source(server, concurrency=1, attempts=1) as source:
        assert len(read_all(source, 3, all_xy(3))) == 48


def test_http_time_out(server):
    released = threading.Event()
    server.always["*"] = lambda request: released.wait(5)
    with (
        http_source(server, read_timeout_s=0.05, attempts=2) as source,
        pytest.raises(SourceError, match="it did not answer in time, 2 times, when asked for tile 0/0/0"),
    ):
        read_all(source, 0, [(0, 0)])
    released.set()


def test_http_nobody_there(server):
    with closing(
        HttpSource(
            SourceDescription(
                template="http://127.0.0.1:9/{z}/{x}/{y}.png?key=abcdefgh", backoff_s=0.001, attempts=5
            )
        )
    ) as source:
        message = r"^http://127\.0\.0\.1:9/{z}/{x}/{y}\.png: the server fails: it cannot be reached, 3 times"
        with pytest.raises(SourceError, match=message):
            read_all(source, 4, all_xy(4))


@pytest.mark.parametrize("status", [400, 401, 403, 418])
def test_http_refusals_are_not_tried_again(server, status):
    server.always["*"] = status
    with (
        http_source(server, concurrency=1) as source,
        pytest.raises(SourceError, match=f"the server answered HTTP {status} when asked for tile 2/0/0; "),
    ):
        read_all(source, 2, all_xy(2))
    assert set(server.tiles_asked().values()) == {1}


def test_http_follows_redirects(server):
    server.always["0/0/0"] = (302, {"Location": "/2/3/1.png"}, b"")
    with http_source(server) as source:
        (batch,) = source.read(0, all_xy(0))
        assert (batch.pixels == colour_of(2, 3, 1)).all()


def test_http_zooms_that_the_server_does_not_have_are_not_asked_for(server):
    with http_source(server, min_zoom=2, max_zoom=3) as source:
        assert read_all(source, 1, all_xy(1)) == read_all(source, 4, all_xy(4)) == []
        assert len(read_all(source, 3, all_xy(3))) == 64
    assert len(server.requests) == 64


def test_http_placeholders(server):
    path = "/{z}-{x}-{y}-{-y}-{quadkey}-{s}/0/0/0.png"
    tile = Tile(5, 19, 3)
    with http_source(server, path) as source:
        (batch,) = source.read(5, np.array([tile[1:]]))
    assert server.requests[0].path == f"/5-19-3-{tms_row(tile)}-{quadkey(tile)}-b/0/0/0.png"
    assert batch.positions.tolist() == [0]


def test_http_says_who_asks(server, monkeypatch):
    monkeypatch.setenv("GEOENGINE_CONTACT", "mailto:me@example.org")
    with http_source(server) as source:
        read_all(source, 0, [(0, 0)])
    monkeypatch.delenv("GEOENGINE_CONTACT")
    with http_source(server) as source:
        read_all(source, 0, [(0, 0)])
    with http_source(server, headers={"User-Agent": "mine", "Referer": "https://me"}) as source:
        read_all(source, 0, [(0, 0)])
    agents = [request.headers["User-Agent"] for request in server.requests]
    own = f"geoengine/{version('geoengine')}"
    assert agents == [f"{own} (+mailto:me@example.org)", own, "mine"]
    assert server.requests[-1].headers["Referer"] == "https://me"


def test_http_keys_are_sent_and_never_shown(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TILE_KEY", " s3cret/key+1 ")
    path = "/{env:TILE_KEY}/{z}/{x}/{y}.png?key={env:TILE_KEY}&token=typed-here"
    server.faults["1/0/0"] = [500]
    with http_source(server, path) as source:
        assert source.name == f"{server.address}/{{env:TILE_KEY}}/{{z}}/{{x}}/{{y}}.png"
        assert len(read_all(source, 1, all_xy(1))) == 4
        assert "/s3cret/key%2B1/1/0/0.png?key=s3cret/key%2B1&token=typed-here" in [
            r.path for r in server.requests
        ]
        for status in (403, 500):
            server.always["*"] = status
            with pytest.raises(SourceError) as caught:
                read_all(source, 1, all_xy(1))
            assert "s3cret" not in str(caught.value)
            assert "typed-here" not in str(caught.value)
            if status == 403:
                assert "check the key in the environment variable TILE_KEY" in str(caught.value)
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert "s3cret" not in logged
    assert "typed-here" not in logged


def test_http_password_of_the_template_is_not_shown(server):
    address = server.address.replace("http://", "http://user:password@")
    with closing(HttpSource(SourceDescription(template=address + "/{z}/{x}/{y}.png"))) as source:
        assert source.name == f"{server.address}/{{z}}/{{x}}/{{y}}.png"
        assert read_all(source, 0, [(0, 0)]) == [0]
    assert server.requests[0].headers["Authorization"].startswith("Basic ")


def test_http_leaves_the_libraries_logs_alone_when_closed(server):
    before = list(logging.getLogger("hpack.hpack").filters)
    with http_source(server):
        assert logging.getLogger("hpack.hpack").filters != before
    assert logging.getLogger("hpack.hpack").filters == before


def test_http_keys_in_headers_stay_with_their_host(server, monkeypatch):
    monkeypatch.setenv("TILE_KEY", "s3cret-key")
    server.always["0/0/0"] = (
        302,
        {"Location": server.address.replace("127.0.0.1", "localhost") + "/1/0/0"},
        b"",
    )
    with http_source(server, headers={"Authorization": "Bearer {env:TILE_KEY}"}) as source:
        list(source.read(0, all_xy(0)))
        assert "s3cret" not in repr(source._description)
    sent = [request.headers["Authorization"] for request in server.requests]
    assert sent == ["Bearer s3cret-key", None]


def test_http_asks_through_the_proxy_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    template = "http://tiles.example/{z}/{x}/{y}.png"
    with closing(HttpSource(SourceDescription(template=template))) as source:
        assert read_all(source, 0, [(0, 0)]) == [0]
    assert server.requests[0].path == "http://tiles.example/0/0/0.png"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http_source(server) as source:
        assert read_all(source, 0, [(0, 0)]) == [0]
    assert server.requests[1].path == "/0/0/0.png"
    monkeypatch.setenv("http_proxy", "socks5://localhost:1")
    with pytest.raises(SourceError, match="the proxy in the environment is not an http:// or https:// one"):
        HttpSource(SourceDescription(template=template))


def test_http_offers_http2(monkeypatch):
    pytest.importorskip("h2")
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        template = f"https://127.0.0.1:{listener.getsockname()[1]}/{{z}}/{{x}}/{{y}}.png"
        hello = []

        def listen():
            connection, _ = listener.accept()
            hello.append(connection.recv(4096))
            connection.close()

        thread = threading.Thread(target=listen)
        thread.start()
        source = HttpSource(SourceDescription(template=template, attempts=1))
        with closing(source), pytest.raises(SourceError, match="it cannot be reached"):
            read_all(source, 0, [(0, 0)])
        thread.join()
    assert b"\x02h2" in hello[0]  # the protocol's name, with its length, in the list of those on offer


def test_http_tiles_outside_the_bounds_are_not_asked_for(server):
    with http_source(server, bounds=LngLatBbox(5.0, 45.0, 11.0, 48.0)) as source:
        asked = all_xy(4)
        inside = xy_in_bbox(source.bounds, 4).tolist()
        assert [asked[i].tolist() for i in read_all(source, 4, asked)] == sorted(inside)
    assert len(server.requests) == len(inside)


def test_http_an_abandoned_request_stops_asking(server):
    with http_source(server, concurrency=2) as source:
        batches = source.read(5, all_xy(5))
        next(batches)
        batches.close()
        time.sleep(0.05)  # the two requests under way end
        asked = len(server.requests)
        time.sleep(0.1)
        assert len(server.requests) == asked < 512


def test_http_an_abandoned_request_stops_trying_again(server):
    server.always["5/0/0"] = 500
    with http_source(server, backoff_s=0.8, attempts=5) as source:
        batches = source.read(5, all_xy(5))
        next(batches)
        batches.close()
        time.sleep(0.02)
        tried = server.tiles_asked()["/5/0/0.png"]
        time.sleep(1)
        assert server.tiles_asked()["/5/0/0.png"] == tried == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "https://host/{z}/{x}.png?key=abc",
            r"^https://host/{z}/{x}\.png: a URL template needs {z}, {x} and {y}, or",
        ),
        ("https://host/tiles.png", "a URL template needs {z}, {x} and {y}, or {quadkey}"),
        ("https://host/{zoom}/{x}/{y}.png", "{zoom} is no placeholder; there are {z}, {x}, {y}, {-y}"),
        ("https://host:port/{z}/{x}/{y}.png", "the tile source's URL template is no valid URL"),
        ("https:///{z}/{x}/{y}.png", "the tile source's URL template is no valid URL"),
        (
            "https://host/{z}/{x}/{y}.png?key={env:NO_SUCH_KEY}",
            r"^https://host/{z}/{x}/{y}\.png: the environment variable NO_SUCH_KEY, which it needs, is not",
        ),
    ],
)
def test_http_templates_that_cannot_be_used(template, message):
    with pytest.raises(SourceError, match=message):
        open_source(template)


def test_http_headers_that_cannot_be_sent():
    with pytest.raises(SourceError, match="a header has characters that cannot be sent"):
        HttpSource(SourceDescription(template="https://host/{z}/{x}/{y}", headers={"A": "b\r\nc: d"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_zoom": 5, "max_zoom": 4}, "zooms 5 to 4 are not a range"),
        ({"concurrency": 0}, "concurrency and attempts must be at least 1"),
        ({"backoff_s": -1.0}, "times, rates and sizes must not be negative"),
    ],
)
def test_http_settings_are_checked(settings, message):
    with pytest.raises(SourceError, match=message):
        SourceDescription(template="https://host/{z}/{x}/{y}.png", **settings)


def test_http_tiles_that_cannot_exist_are_an_error(server):
    with http_source(server) as source, pytest.raises(TileError, match="tile 3/8/0 is outside zoom 3"):
        list(source.read(3, np.array([(8, 0)])))
    assert not server.requests
