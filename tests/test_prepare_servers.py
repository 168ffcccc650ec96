"""Preparing a data set: what servers answer, and how they are treated."""

import json
import time
from email.utils import formatdate

import pytest
from made_prepared import FAST, dropped, listed, photo_server, prepared
from made_sets import distinct_photo

from geoengine.training.mp16.hosts import Politeness, forbidding
from geoengine.training.mp16.job import PrepareConfig, PrepareJob


@pytest.fixture
def server():
    with photo_server() as server:
        yield server


def test_what_servers_answer(server, tmp_path):
    table = listed(server, tmp_path, 12)
    picture = server.files["/p/2.jpg"]
    server.always["p/0"] = 404
    server.faults["p/1"] = [500, 503]
    server.faults["p/2"] = [(200, {"Content-Length": str(len(picture) + 9)}, picture)]
    server.always["p/3"] = (200, {"Content-Type": "text/html"}, b"<html>log in</html>")
    server.always["p/4"] = (200, {"X-Robots-Tag": "noai"}, distinct_photo(4))
    server.always["p/5"] = (302, {"Location": "/gone/photo_unavailable_z.png"})
    server.always["gone/photo_unavailable_z"] = (200, {}, distinct_photo(99))
    server.always["p/6"] = 500
    server.always["p/7"] = 403
    server.faults["p/8"] = [lambda request: time.sleep(1.5)]
    server.always["p/9"] = 451
    outcomes, left = prepared(table, tmp_path / "out")
    assert dropped(tmp_path / "out") == {
        "p/0.jpg": ("dead", "HTTP 404"),
        "p/3.jpg": (
            "unreadable",
            "the photo: this is not an image of a kind that can be read "
            "(JPEG, PNG, WebP, TIFF, AVIF, HEIC, GIF, BMP)",
        ),
        "p/4.jpg": ("refused", "X-Robots-Tag: noai"),
        "p/5.jpg": ("dead", "the host shows that the photo is gone"),
        "p/6.jpg": ("failed", "the server fails"),
        "p/7.jpg": ("failed", "HTTP 403"),
        "p/9.jpg": ("dead", "HTTP 451"),
    }
    assert (outcomes["kept"], left) == (5, 2)
    asked = server.tiles_asked()
    assert (asked["/p/0.jpg"], asked["/p/4.jpg"], asked["/p/9.jpg"]) == (1, 1, 1)
    assert asked["/robots.txt"] == 1
    del server.always["p/6"], server.always["p/7"]
    outcomes, left = prepared(table, tmp_path / "out")
    assert (outcomes["kept"], left) == (7, 0)
    assert server.tiles_asked()["/p/0.jpg"] == 1


def test_retry_after_is_honoured(server, tmp_path):
    table = listed(server, tmp_path, 3)
    server.faults["p/0"] = [(429, {"Retry-After": "1"})]
    start = time.monotonic()
    assert prepared(table, tmp_path / "out", workers=1) == ({"kept": 3}, 0)
    assert time.monotonic() - start >= 1
    gaps = [after - before for before, after in zip(server.times[1:], server.times[2:], strict=False)]
    assert max(gaps) >= 0.99


def test_a_host_that_asks_for_a_long_wait_is_left_alone(server, tmp_path):
    table = listed(server, tmp_path, 20)
    server.always["*"] = (429, {"Retry-After": formatdate(time.time() + 3600, usegmt=True)})
    server.always["p/0"] = (200, {}, server.files["/p/0.jpg"])
    job = PrepareJob(PrepareConfig(metadata=str(table), politeness=FAST, workers=2), tmp_path / "out")
    job.survey()
    list(job.run())
    assert job.finish() == 19
    [(host, reason)] = job.left_alone.items()
    job.close()
    assert host == server.address
    assert "the server asks to wait for 3" in reason
    assert len(server.requests) <= 5
    server.always = {"robots": 404}
    assert prepared(table, tmp_path / "out") == ({"kept": 20}, 0)


def test_a_host_that_refuses_everything_is_left_alone(server, tmp_path):
    table = listed(server, tmp_path, 40)
    server.always["*"] = 403
    outcomes, left = prepared(table, tmp_path / "out", workers=1)
    assert (outcomes["kept"], outcomes["failed"], left) == (0, 7, 40)
    assert len(server.requests) == 9
    assert json.loads((tmp_path / "out" / "splits.json").read_text())["left"] == 40


def test_robots_txt_is_obeyed(server, tmp_path):
    rules = b"User-agent: geoengine\nDisallow: /p/1\nCrawl-delay: 0.2\n\nUser-agent: *\nDisallow: /\n"
    table = listed(server, tmp_path, 4)
    server.always["robots"] = (200, {}, rules.replace(b"0.2", b"1"))
    start = time.monotonic()
    outcomes, _ = prepared(table, tmp_path / "out")
    assert outcomes == {"kept": 3, "refused": 1}
    assert "/p/1.jpg" not in server.tiles_asked()
    assert time.monotonic() - start >= 2


def test_the_rate_holds_for_each_host(server, tmp_path):
    table = listed(server, tmp_path, 6)
    start = time.monotonic()
    config = PrepareConfig(metadata=str(table), politeness=Politeness(rate_per_s=10.0))
    job = PrepareJob(config, tmp_path / "out")
    list(job.run())
    job.close()
    assert time.monotonic() - start >= 0.55


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"x-robots-tag": "noai"}, "X-Robots-Tag: noai"),
        ({"x-robots-tag": "nofollow, NoImageAI"}, "X-Robots-Tag: noimageai"),
        ({"x-robots-tag": "geoengine: noindex"}, "X-Robots-Tag: noindex"),
        ({"x-robots-tag": "otherbot: noai"}, ""),
        ({"x-robots-tag": "all"}, ""),
        ({"tdm-reservation": "1"}, "TDM-Reservation: 1"),
        ({"tdm-reservation": "0"}, ""),
        ({}, ""),
    ],
)
def test_headers_that_forbid_training(headers, found):
    assert forbidding(headers) == found
