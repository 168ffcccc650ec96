"""The web page in a real browser: what can go wrong, and what the page says then."""

import re

import pytest
from page_browser import PLACE, choose, expect, pages, rows, running_browser, searching_server
from page_server import made_search, page_server, problem


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture
def server():
    with searching_server() as server:
        yield server


@pytest.fixture
def open_page(browser):
    with pages(browser) as open_page:
        yield open_page


@pytest.mark.parametrize(
    ("name", "kind", "data", "title", "text"),
    [
        (
            "notes.txt",
            "text/plain",
            b"hello",
            "This is not a photo that can be read",
            "“notes.txt” is not a picture",
        ),
        ("empty.jpg", "image/jpeg", b"", "This is not a photo", "“empty.jpg” is empty"),
        (
            "big.jpg",
            "image/jpeg",
            b"x" * 200_000,
            "This photo is too large",
            "this server takes 0.1 MB",
        ),
    ],
)
def test_files_that_are_refused_before_they_are_sent(server, open_page, name, kind, data, title, text):
    page = open_page(server.address)
    choose(page, data, name, kind)
    expect(page.get_by_role("alert")).to_contain_text(title)
    expect(page.get_by_role("alert")).to_contain_text(text)
    expect(page.locator("#retry")).to_be_hidden()
    assert not server.bodies
    choose(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#result")).to_be_visible()


@pytest.mark.parametrize(
    ("refused", "title", "again"),
    [
        (problem(413, "the photo has too many pixels"), "This photo is too large", False),
        (problem(415, "this is no picture"), "This is not a photo that can be read", False),
        (problem(422, "there are no map tiles in this region"), "This cannot be searched", False),
        (problem(503, "the queue is full"), "The server is busy or not well", True),
    ],
)
def test_what_the_server_refuses(server, open_page, refused, title, again):
    page = open_page(server.address, accept=["the server responded with a status"])
    answer, server.answer = server.answer, refused
    choose(page)
    expect(page.get_by_role("alert")).to_contain_text(title)
    expect(page.locator("#problem-text")).to_have_text(refused["detail"].capitalize() + ".")
    assert page.locator("#retry").is_visible() == again
    if again:
        server.answer = answer
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#result")).to_be_visible()
        expect(page.get_by_role("alert")).to_be_hidden()


def test_a_rate_limit_is_waited_for(server, open_page):
    page = open_page(server.address, accept=["the server responded with a status"])
    answer, server.answer = server.answer, problem(429, "too many requests of this client", retry_after=2)
    choose(page)
    retry = page.locator("#retry")
    expect(retry).to_be_disabled()
    expect(retry).to_have_text(re.compile(r"Try again in [12] s"))
    server.answer = answer
    expect(retry).to_be_enabled()
    retry.click()
    expect(page.locator("#result")).to_be_visible()


def test_a_server_that_is_gone_and_comes_back(server, open_page):
    page = open_page(server.address, accept=["ERR_CONNECTION", "Failed to load resource"])
    expect(page.locator("#about")).to_contain_text("geoengine 0.1.0")
    port = server.http.server_port
    server.stop()
    choose(page)
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    with page_server(port) as again:
        again.answer = server.answer
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#result")).to_be_visible()


def test_an_answer_that_breaks_off(server, open_page):
    events, _ = made_search(PLACE)
    whole = server.answer

    def cut(tell):
        for name, data in events[:3]:
            tell(name, data)

    server.answer = cut
    page = open_page(server.address)
    choose(page)
    expect(page.get_by_role("alert")).to_contain_text("The connection broke off")
    expect(page.get_by_role("alert")).to_contain_text("as far as level 3")
    expect(rows(page)).to_have_count(3)
    server.answer = whole
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#result")).to_be_visible()
    expect(rows(page)).to_have_count(7)


def test_an_error_in_the_middle_of_a_search(server, open_page):
    events, _ = made_search(PLACE)

    def fails(tell):
        tell(*events[0])
        tell("error", problem(503, "the tile server fails"))

    server.answer = fails
    page = open_page(server.address)
    choose(page)
    expect(page.locator("#problem-text")).to_have_text("The tile server fails.")
    expect(page.locator("#retry")).to_be_visible()


def test_a_key_is_asked_for_only_when_it_is_needed(server, open_page):
    server.key = "right"
    page = open_page(server.address, accept=["401"])
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.locator("#pick")).to_be_hidden()
    for key in ("wrong", "right"):
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        if key == "wrong":
            expect(page.get_by_role("alert")).to_contain_text("This key is not accepted")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.get_by_role("alert")).to_be_hidden()
    choose(page)
    expect(page.locator("#result")).to_be_visible()
    expect(page.locator("#map img[src^=blob]").first).to_be_attached()
    assert "right" not in page.url and not any("right" in path for path in server.requests)


def test_a_map_that_may_not_be_shown(server, open_page):
    server.about["tiles"] = server.about["tiles"] | {"shown": False, "reason": "its terms forbid it"}
    server.about |= {"world": "earth", "demo": False}
    page = open_page(server.address)
    expect(page.locator("#map-note")).to_have_text("The map is not shown: its terms forbid it.")
    expect(page.locator("#map path.land")).to_have_count(1)  # the coasts instead
    expect(page.locator("#samples")).to_be_hidden()
    expect(page.locator("#banner")).to_be_hidden()
    choose(page)
    expect(page.locator("#map path.radius")).to_have_count(1)
    assert not any(path.startswith("/v1/tiles") for path in server.requests)


def test_text_of_the_server_is_not_markup(server, open_page):
    server.about["model"] = "<img src=x>"
    page = open_page(server.address)
    expect(page.locator(".leaflet-control-attribution")).to_have_text("made <b>tiles</b> & more")
    expect(page.locator("#about")).to_contain_text("<img src=x>")
