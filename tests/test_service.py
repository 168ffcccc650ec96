"""The service over real HTTP: answers, refusals, and what happens when something is in trouble."""

import io
import json
import logging

import jsonschema
import numpy as np
import pytest
from PIL import Image
from served import SMALL, events, is_problem, photo_of_the_planet, served

from geoengine.engine.regions import parse_region
from geoengine.engine.render.json_lines import json_object, schema_text
from geoengine.engine.search import SearchConfig


@pytest.fixture(scope="module")
def photo():
    return photo_of_the_planet()


@pytest.fixture(scope="module")
def service():
    with pytest.MonkeyPatch.context() as monkeypatch, served(monkeypatch) as running:
        yield running


# --- answers -----------------------------------------------------------------------------------------------


def test_a_photo_is_located_as_the_engine_does_it(service, photo):
    answer = service.locate(photo).json()
    jsonschema.validate(answer, json.loads(schema_text()))
    image = np.asarray(Image.open(io.BytesIO(photo)))
    [location] = service.locator.engine.locate(
        [image], config=SearchConfig(k=2, levels=(4, 6, 8), within=parse_region("0,0,60,60"))
    )
    expected = json_object(location)
    for result in (answer, expected):
        result.pop("seconds")
        assert all(level.pop("known") >= 0 for level in result["levels"])
    assert answer == expected | {"photo": "photo"}


def test_a_form_gives_the_same_as_the_bare_photo(service, photo):
    bare = service.locate(photo).json()
    form = service.client.post("/v1/locate", files={"photo": ("secret.jpg", photo)}, data=SMALL)
    assert form.json()["candidates"] == bare["candidates"]
    mixed = service.client.post(
        "/v1/locate?k=2&within=0,0,60,60", files={"photo": photo}, data={"levels": "4-8"}
    )
    assert mixed.json()["candidates"] == bare["candidates"]


def test_geojson_for_who_accepts_it(service, photo):
    answer = service.locate(photo, headers={"Accept": "application/geo+json"})
    assert answer.headers["Content-Type"] == "application/geo+json"
    assert answer.json()["type"] == "FeatureCollection"
    for accept in (
        "*/*",
        "application/*",
        "text/html, application/json;q=0.9",
        "application/geo+json;q=0.1, */*",
    ):
        answer = service.locate(photo, headers={"Accept": accept})
        assert answer.headers["Content-Type"] == "application/json", accept


def test_options_of_a_search_reach_it(service, photo):
    region = {"type": "Polygon", "coordinates": [[[0, 0], [40, 0], [40, 40], [0, 40], [0, 0]]]}
    chosen = {"within": json.dumps(region), "score": "path", "quota": "1", "objective": "750km", "top": "2"}
    answer = service.client.post("/v1/locate", files={"photo": photo}, data=SMALL | chosen).json()
    assert answer["scoring"] == {
        "score": "path", "calibrated": answer["scoring"]["calibrated"], "centred": False, "quota": 1,
        "objective": "750km", "prior": "", "method": "tiles",
    }  # fmt: skip
    assert answer["within"] == "a GeoJSON region"
    assert all(-23 <= c["longitude"] <= 63 for c in answer["candidates"])
    box = service.locate(photo, params={"within": "0,0,40,40", "levels": "4"}).json()
    assert box["levels"][0]["candidates"] == 4


def test_a_stream_tells_every_level_and_then_the_result(service, photo):
    service.forget()
    with service.client.stream("POST", "/v1/locate/stream", files={"photo": photo}, data=SMALL) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        told = events(response)
    names = [name for name, _ in told]
    assert names[0] == "accepted" and names[-1] == "result" and "progress" in names
    result = told[-1][1]
    jsonschema.validate(result, json.loads(schema_text()))
    levels = [data for name, data in told if name == "level"]
    assert [(level.pop("index"), level.pop("levels")) for level in levels] == [(0, 3), (1, 3), (2, 3)]
    assert levels == result["levels"]
    for data in (data for name, data in told if name == "progress"):
        assert 0 <= data["done"] <= data["total"]


def test_map_tiles_are_those_of_the_source(service):
    answer = service.client.get("/v1/tiles/6/34/21")
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert answer.headers["Cache-Control"] == "private, max-age=3600"
    found = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))
    [batch] = service.locator.engine.source.read(6, np.array([[34, 21]]))
    assert np.abs(found.astype(int) - batch.pixels[0]).mean() < 6


def test_tiles_of_a_source_that_forbids_it_are_not_shown(service, monkeypatch):
    monkeypatch.setattr(type(service.locator.engine.source), "storable", False)
    assert "terms" in is_problem(service.client.get("/v1/tiles/6/34/21"), 404)
    assert service.client.get("/v1/about").json()["tiles"]["shown"] is False


def test_about_and_health_say_what_there_is(service):
    about = service.client.get("/v1/about").json()
    assert (about["world"], about["levels"]) == ("planet", [4, 6, 8, 10, 12, 14, 16])
    assert about["tiles"]["max_zoom"] == 18 and about["limits"]["max_k"] == 64
    health = service.client.get("/health")
    assert health.status_code == 200
    told = health.json()
    assert (told["status"], told["backend"], told["precision"]) == ("ok", "onnxruntime-cpu", "fp32")
    assert told["device"] == "CPU, 2 threads"
    assert len(told["bundle"]["hash"]) == 64 and told["index"] is None


def test_metrics_count_requests_and_batches(service, photo):
    service.locate(photo)
    text = service.client.get("/metrics").text
    assert 'geoengine_requests_total{route="/v1/locate",status="200"}' in text
    for name in ("stage_seconds_count", "batch_pictures_bucket", "pictures_encoded", "waiting", "rows_kept"):
        assert f"geoengine_{name}" in text
    for stage in ("receive", "decode", "wait", "embed", "level"):
        assert f'stage="{stage}"' in text


def test_the_openapi_document_is_whole_and_loads_nothing_from_elsewhere(service):
    document = service.client.get("/openapi.json").json()
    assert {"/v1/locate", "/v1/locate/stream", "/v1/tiles/{z}/{x}/{y}", "/health"} <= set(document["paths"])
    locate = document["paths"]["/v1/locate"]["post"]
    assert {p["name"] for p in locate["parameters"]} >= {"k", "levels", "within", "score"}
    assert set(locate["requestBody"]["content"]) >= {"multipart/form-data", "image/jpeg"}
    assert {"413", "415", "422", "429", "503"} <= set(locate["responses"])
    assert service.client.get("/docs").status_code == 404


# --- refusals ----------------------------------------------------------------------------------------------


def bomb():
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("status", "words", "request_"),
    [
        (422, "no photo", {"content": b""}),
        (415, "not an image", {"content": b"hello"}),
        (422, "photo", {"content": "photo[:900]"}),
        (413, "81,000,000 pixels", {"content": bomb()}),
        (415, "send the photo itself", {"content": b"x", "headers": {"Content-Type": "text/plain"}}),
        (415, "content encoding", {"content": b"x", "headers": {"Content-Encoding": "gzip"}}),
        (413, "limit", {"content": b"x" * (33 << 20)}),
        (406, "accept one of them", {"content": "photo", "headers": {"Accept": "text/html"}}),
        (422, "parameter k", {"content": "photo", "params": {"k": "0"}}),
        (422, "parameter k", {"content": "photo", "params": {"k": "9" * 5000}}),
        (422, "k must be at most 64", {"content": "photo", "params": {"k": "65"}}),
        (422, "not known", {"content": "photo", "params": {"depth": "3"}}),
        (422, "given twice", {"content": "photo", "params": [("k", "1"), ("k", "2")]}),
        (422, "level 5 is not offered", {"content": "photo", "params": {"levels": "4,5"}}),
        (422, "levels are zooms", {"content": "photo", "params": {"levels": "deep"}}),
        (422, "would look at", {"content": "photo", "params": {"levels": "4,16", "k": "1"}}),
        (422, "would look at", {"content": "photo", "params": {"levels": "12"}}),
        (422, "no region", {"content": "photo", "params": {"within": "/etc/passwd"}}),
        (422, "within", {"content": "photo", "params": {"within": '{"type": "Point"}'}}),
        (422, "within", {"content": "photo", "params": {"within": '{"type": ' * 3000}}),
        (422, "finite", {"content": "photo", "params": {"within": "0,0,nan,1"}}),
        (422, "is on Earth", {"content": "photo", "params": {"within": "FR"}}),
        (422, "parameter score", {"content": "photo", "params": {"score": "best"}}),
        (422, "objective", {"content": "photo", "params": {"objective": "near"}}),
        (422, "no photo", {"data": {"k": "2"}, "files": {"other": b"x"}}),
        (422, "two parts", {"files": [("photo", b"x"), ("photo", b"y")]}),
        (400, "boundary", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}),
        (400, "damaged", {"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}),
        (400, "ends early", {
            "content": b'--b\r\nContent-Disposition: form-data; name="photo"\r\n\r\nabc',
            "headers": {"Content-Type": "multipart/form-data; boundary=b"},
        }),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/locate", "/v1/locate/stream"])
def test_what_cannot_be_done_is_refused_in_one_sentence(service, photo, status, words, request_, path):
    if status == 406 and path.endswith("stream"):
        return
    sent = {key: {"photo": photo, "photo[:900]": photo[:900]}.get(v, v) if isinstance(v, str) else v
            for key, v in request_.items()}  # fmt: skip
    if "content" in sent:
        sent["headers"] = {"Content-Type": "image/jpeg"} | sent.get("headers", {})
    assert words in is_problem(service.client.post(path, **sent), status)


@pytest.mark.parametrize("path", ["/nothing", "/static/../app.py", "/static/%2e%2e/app.py", "/static/a%00b"])
def test_there_is_nothing_else(service, path):
    is_problem(service.client.get(path), 404)
    assert service.client.get("/v1/locate").status_code == 405
    assert service.client.get("/").status_code == 200


@pytest.mark.parametrize(
    ("tile", "status"),
    [("19/0/0", 404), ("3/8/0", 404), ("a/0/0", 422), ("-1/0/0", 422), (f"4/{2**70}/0", 422)],
)
def test_tiles_that_do_not_exist_are_refused(service, tile, status):
    is_problem(service.client.get(f"/v1/tiles/{tile}"), status)


def test_bodies_of_unknown_length_are_read_no_further_than_the_limit(service):
    sent = []

    def chunks():
        for _ in range(400):
            sent.append(1)
            yield b"x" * (1 << 20)

    with IgnoringAReset():
        is_problem(service.locate(chunks()), 413)


class IgnoringAReset:
    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        return kind is not None and kind.__name__ in ("WriteError", "ReadError", "RemoteProtocolError")


def test_pages_of_other_sites_are_refused(service, photo):
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
    ):
        is_problem(service.locate(photo, headers=headers), 403)
        is_problem(service.client.get("/health", headers=headers), 403)
    own = {"Sec-Fetch-Site": "same-origin", "Origin": service.url}
    assert service.locate(photo, headers=own).status_code == 200
    assert service.client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200, "a link"


def test_every_response_is_closed_to_other_sites(service):
    for path in ("/", "/health", "/nothing", "/v1/tiles/0/0/0"):
        headers = service.client.get(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
        assert "server" not in headers


def test_logs_hold_nothing_that_the_client_has_sent(service, photo, caplog):
    caplog.set_level(logging.DEBUG)
    service.client.post(
        "/v1/locate", files={"photo": ("holiday.jpg", photo)}, data=SMALL | {"within": "1,2,33,44"}
    )
    service.client.get("/v1/tiles/9/123/234")
    service.client.get("/secret/path?lat=12.5")
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("geoengine", "uvicorn", "fastapi"))]
    assert any("POST /v1/locate status=200" in line for line in ours)
    for word in ("holiday", "33", "123", "12.5", "secret"):
        assert not any(
            word in line.split(" ms=")[0].split(" ", 1)[1] for line in ours if "request=" in line
        ), word


def test_a_fault_of_ours_is_told_without_its_text(service, photo, monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("the photo shows 12.5, 41.9")

    monkeypatch.setattr(type(service.locator), "prepare", broken)
    is_problem(service.locate(photo), 500)
    service.until(lambda: "RuntimeError" in caplog.text)
    assert "41.9" not in caplog.text
