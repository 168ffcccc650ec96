"""The web page in a real browser, for the tests of it."""

import io
import shutil
from contextlib import contextmanager

import pytest
from page_server import made_search, page_server
from PIL import Image

from geoengine.engine.tiles import LngLat

pytest.importorskip("playwright", reason="the page's tests need playwright")
from playwright.sync_api import expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PLACE = LngLat(7.5, 46.25)
CALM = {"reduced_motion": "reduce", "viewport": {"width": 1200, "height": 800}}
expect.set_options(timeout=15_000)


@contextmanager
def running_browser():
    """A browser of this machine; without one the tests are skipped."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def searching_server():
    """A server that answers a search of `PLACE`."""
    with page_server() as server:
        events, result = made_search(PLACE)
        server.answer = told(events, result)
        yield server


@contextmanager
def pages(browser):
    """What opens a URL in a fresh browser context; whatever the console complains of fails the test."""
    contexts, complaints = [], []

    def open_page(url, *, accept=(), **options):
        context = browser.new_context(**(CALM | options))
        contexts.append(context)
        page = context.new_page()

        def heard(text):
            if not any(word in text for word in accept):
                complaints.append(text)

        page.on("console", lambda message: message.type in ("error", "warning") and heard(message.text))
        page.on("pageerror", lambda error: heard(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def told(events, result, *, before=None):
    """Return what answers a search with its events; `before(name)` is called before each."""

    def answer(tell):
        tell("accepted", {"request": "1", "waiting": 0})
        for name, data in [*events, ("result", result)]:
            if before is not None:
                before(data.get("zoom", name))
            tell(name, data)

    return answer


def jpeg(size=(40, 30), colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def choose(page, data=None, name="photo.jpg", kind="image/jpeg"):
    page.set_input_files(
        "#file", {"name": name, "mimeType": kind, "buffer": jpeg() if data is None else data}
    )


def rows(page):
    return page.locator("#levels tr")
