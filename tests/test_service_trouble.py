"""The service in trouble: encoders that fail or hang, clients that leave, wait or ask too much, and keys."""

import logging
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from served import SMALL, events, is_problem, photo_of_the_planet, served

from geoengine.bench.service_malformed import cut_off, raw_noise, wrong_types
from geoengine.bench.service_runs import Service
from geoengine.engine.errors import BackendError
from geoengine.service.keys import new_key


@pytest.fixture(scope="module")
def photo():
    return photo_of_the_planet()


@pytest.fixture(scope="module")
def service():
    with pytest.MonkeyPatch.context() as monkeypatch, served(monkeypatch) as running:
        yield running


@pytest.fixture
def trouble(service):
    """The service, whose encoder may be held or made to fail."""
    service.forget()
    yield service
    service.backend.error = None
    service.backend.go_on.set()
    service.until(lambda: service.locator.admission.held == service.locator.admission.searching == 0)


def test_an_encoder_that_raises_fails_the_request_and_the_next_one_works(trouble, photo):
    trouble.backend.error = BackendError("/a/path is broken")
    for _ in range(3):
        detail = is_problem(trouble.locate(photo), 503)
        assert "/a/path" not in detail
    health = trouble.client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failing")
    with trouble.client.stream("POST", "/v1/locate/stream", files={"photo": photo}, data=SMALL) as response:
        assert events(response)[-1][0] == "error"
    trouble.backend.error = None
    assert trouble.locate(photo).status_code == 200
    assert trouble.client.get("/health").status_code == 200


def hang_up(service, photo, path):
    """Send a request, and leave once it is searched."""
    parts = urlsplit(service.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        head = (f"POST {path}?levels=4-8&k=2&within=0,0,60,60 HTTP/1.1\r\nHost: {parts.netloc}\r\n"
                f"Content-Type: image/jpeg\r\nContent-Length: {len(photo)}\r\n\r\n")  # fmt: skip
        connection.sendall(head.encode() + photo)
        service.until(lambda: service.locator.admission.searching == 1)


@pytest.mark.parametrize("path", ["/v1/locate", "/v1/locate/stream"])
def test_a_client_that_leaves_ends_its_search(trouble, photo, path):
    trouble.backend.go_on.clear()
    hang_up(trouble, photo, path)
    trouble.until(lambda: trouble.locator.admission.searching == 0)  # though the encoder still hangs
    before = trouble.backend.calls
    trouble.backend.go_on.set()
    trouble.until(lambda: trouble.locator.shared.state.busy_s == 0)
    assert trouble.backend.calls <= before + 1


def test_requests_of_one_client_share_batches(trouble, photo):
    trouble.backend.go_on.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(trouble.locate, photo) for _ in range(4)]
        trouble.until(lambda: trouble.locator.admission.searching == 4)
        trouble.backend.go_on.set()
        found = [answer.result().json()["candidates"] for answer in answers]
    assert all(candidates == found[0] for candidates in found)


def test_a_stalled_encoder_hangs_nobody(photo, monkeypatch):
    with served(monkeypatch, deadline_s=1.5, stall_s=0.3, restart_s=2.0, searching=2) as service:
        service.backend.go_on.clear()
        start = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            first = [pool.submit(service.locate, photo) for _ in range(4)]
            service.until(lambda: service.locator.stalled)
            assert "do not answer" in is_problem(service.locate(photo), 503)
            health = service.client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "stalled")
            for answer in first:
                is_problem(answer.result(), 503)
        assert time.monotonic() - start < 5
        service.until(lambda: service.ended)
        assert service.ended[0] == 70
        service.backend.go_on.set()
        service.until(lambda: service.locator.shared.state.busy_s == 0)
        service.until(lambda: service.locate(photo).status_code == 200)


def test_a_full_queue_and_a_greedy_client_are_told_to_wait(photo, monkeypatch):
    with served(monkeypatch, searching=1, waiting=1, rate_per_minute=16) as service:
        service.backend.go_on.clear()
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(service.locate, photo) for _ in range(2)]
            service.until(lambda: service.locator.admission.held == 2)
            assert "busy" in is_problem(service.locate(photo), 503)
            service.backend.go_on.set()
            assert [answer.result().status_code for answer in running] == [200, 200]
        assert service.locate(photo).status_code == 200
        assert "too many requests" in is_problem(service.locate(photo), 429)


def test_a_slow_upload_is_given_up(photo, monkeypatch):
    with served(monkeypatch, body_s=0.2) as service:

        def slowly():
            yield photo[:1000]
            time.sleep(0.6)
            yield photo[1000:]

        assert "did not arrive" in is_problem(service.locate(slowly()), 408)
        service.until(lambda: service.locator.admission.held == 0)


def test_keys_are_needed_where_there_are_some(photo, monkeypatch, tmp_path):
    file = tmp_path / "keys"
    keys = [new_key(file, name) for name in ("desk", "archive")]
    with served(monkeypatch, keys=str(file), host="0.0.0.0", searching=2, per_client=1) as service:
        assert service.client.get("/").status_code == 200
        assert set(service.client.get("/health").json()) == {"status", "version"}
        for given in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {keys[0]}"},
                      {"Authorization": f"Bearer {keys[0][:-1]}"}):  # fmt: skip
            answer = service.locate(photo, headers=given)
            is_problem(answer, 401)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert service.client.get("/metrics", headers=given).status_code == 401
            assert service.client.get("/v1/tiles/0/0/0", headers=given).status_code == 401
        desk, archive = ({"Authorization": f"Bearer {key}"} for key in keys)
        assert service.locate(photo, headers=desk).status_code == 200
        assert "backend" in service.client.get("/health", headers=desk).json()
        service.forget()
        service.backend.go_on.clear()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(service.locate, photo, headers=desk)
            service.until(lambda: service.locator.admission.held == 1)
            assert "under way" in is_problem(service.locate(photo, headers=desk), 429)
            service.backend.go_on.set()
            assert running.result().status_code == 200
        assert service.locate(photo, headers=archive).status_code == 200
        lines = file.read_text().splitlines()
        file.write_text("".join(f"{line}\n" for line in lines if not line.startswith("desk")))
        is_problem(service.locate(photo, headers=desk), 401)
        assert service.locate(photo, headers=archive).status_code == 200


def test_no_place_is_told_more_precisely_than_allowed(photo, monkeypatch):
    from geoengine.engine.tiles import Tile, half_diagonal_km

    def fine(tiles):
        return [t for t in tiles if half_diagonal_km(Tile(t["z"], t["x"], t["y"])) < 150]

    with served(monkeypatch, min_precision_km=150.0) as service:
        about = service.client.get("/v1/about").json()
        assert about["levels"] == [4, 6] and about["tiles"]["max_zoom"] == 7
        answer = service.locate(
            photo, params={"levels": "4,6", "k": "40", "top": "40", "within": "-90,-60,90,60"}
        ).json()
        assert answer["radius_km"] >= 150
        tiles = [*answer["candidates"], *(t for c in answer["candidates"] for t in c["path"])]
        tiles += [t for level in answer["levels"] for t in level["beam"]]
        assert len(tiles) > 80 and not fine(tiles)
        with service.client.stream(
            "POST", "/v1/locate/stream", files={"photo": photo}, data={"k": "40"}
        ) as told:
            beams = [t for name, data in events(told) if name == "level" for t in data["beam"]]
        assert len(beams) > 40 and not fine(beams)
        shapes = service.client.post(
            "/v1/locate?k=40", files={"photo": photo}, headers={"Accept": "application/geo+json"}
        )
        names = {tuple(map(int, f["properties"]["tile"].split("/"))) for f in shapes.json()["features"]}
        assert all(half_diagonal_km(Tile(*name)) >= 150 for name in names)
        is_problem(service.locate(photo, params={"levels": "4-8"}), 422)
        is_problem(service.client.get("/v1/tiles/8/0/0"), 404)


@pytest.mark.parametrize("then", [b"zz\r\n", b"5\r\nhello\r\nzz\r\n"])
def test_a_body_that_is_no_http_is_refused_quietly(service, caplog, then):
    parts = urlsplit(service.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(
            b"POST /v1/locate HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + then
        )
        connection.settimeout(5)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    service.until(lambda: service.locator.admission.held == 0)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("make", [cut_off, wrong_types, raw_noise])
def test_nothing_that_is_sent_is_an_error_of_ours(service, photo, caplog, make):
    to = Service(urlsplit(service.url).port, process=None)
    answers = [make(to, photo, random.Random(number)) for number in range(40)]
    assert not [answer for answer in answers if answer.startswith("5") or answer in ("200", "hung")]
    service.until(lambda: service.locator.admission.held == 0)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert service.locate(photo).status_code == 200


def test_silent_connections_are_closed(service, monkeypatch):
    monkeypatch.setattr("geoengine.service.worker._SILENT_S", 0.1)
    parts = urlsplit(service.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(b"POST /v1/locate HT")
        connection.settimeout(5)
        assert connection.recv(100) == b""
    assert threading.active_count() < 60
