"""The web page in a real browser: a photo in, the search live, the answer, for everybody."""

import base64
import json
import threading
from pathlib import Path

import pytest
from page_browser import PLACE, choose, expect, jpeg, pages, rows, running_browser, searching_server, told
from page_server import made_search, problem

PHOTOS = Path(__file__).parent / "data" / "photos"


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


# --- a search ----------------------------------------------------------------------------------------------


def test_levels_come_alive_and_then_the_answer(server, open_page):
    gates = {zoom: threading.Event() for zoom in (8, "result")}
    events, result = made_search(PLACE)
    server.answer = told(events, result, before=lambda step: step not in gates or gates[step].wait(20))
    page = open_page(server.address)
    expect(page.locator("#banner")).to_contain_text("Demo planet, not Earth")
    choose(page)
    expect(rows(page)).to_have_count(2)
    expect(page.locator("#status")).to_have_text("Level 2 of 7, zoom 6: 64 tiles compared, 4 kept.")
    assert page.locator("#progress").get_attribute("value") == str(2 / 7)
    expect(page.locator("#map path.kept:not(.dot)")).to_have_count(4)
    expect(page.locator("#result")).to_be_hidden()
    gates[8].set()
    expect(rows(page)).to_have_count(7)
    expect(page.locator("#result")).to_be_hidden()
    gates["result"].set()
    expect(page.locator("#point")).to_have_text("46.25015° N, 7.50092° E")
    expect(page.locator("#radius")).to_contain_text("Radius: 3.3 km. Zooms 4 to 16, 640 tiles compared.")
    expect(page.locator("#worth")).to_contain_text("A hypothesis, not a proof.")
    expect(page.locator("#radius-meaning")).to_contain_text("not calibrated")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#candidates button")).to_have_count(4)
    expect(page.locator("#candidates .share")).to_have_text(["70.0 %", "20.0 %", "10.0 %", "under 0.1 %"])
    expect(rows(page).nth(0)).to_have_text("4256410.900")
    expect(page.locator("#map path.radius")).to_have_count(1)
    _, kind, body = server.bodies[0]
    assert (kind, body) == ("image/jpeg", jpeg())
    assert server.parameters() == {"top": "5"}


def test_candidates_and_levels_are_shown_on_the_map(server, open_page):
    page = open_page(server.address)
    choose(page)
    second = page.locator("#candidates button").nth(1)
    expect(second).to_have_attribute("aria-pressed", "false")
    second.click()
    expect(page.locator("#candidates button").nth(1)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#candidates button").nth(1)).to_be_focused()
    expect(page.locator(".pin.chosen")).to_have_text("2")
    page.get_by_role("button", name="Zoom 8: show on the map").click()
    expect(page.locator("#map path.before")).to_have_count(4)
    expect(page.locator("#map path.path")).to_have_count(1)
    expect(page.locator("#overview rect")).to_have_count(4)


def test_coordinates_are_copied_and_geojson_is_saved(server, open_page):
    page = open_page(server.address)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    choose(page)
    page.get_by_role("button", name="Copy coordinates").click()
    expect(page.locator("#done")).to_have_text("Copied: 46.2501492, 7.5009155")
    assert page.evaluate("navigator.clipboard.readText()") == "46.2501492, 7.5009155"
    with page.expect_download() as download:
        page.get_by_role("button", name="Download GeoJSON").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert download.value.suggested_filename == "geoengine.geojson"
    assert len(saved["features"]) == 4 + 7 * 4


def test_options_become_parameters(server, open_page):
    page = open_page(server.address)
    page.locator("summary").click()
    page.get_by_label("Beam width").select_option("4")
    page.get_by_label("Search only within").fill("CH")
    page.get_by_label("Score").select_option("path")
    assert page.locator("#method").count() == 0  # one method is no choice
    choose(page)
    expect(page.locator("#result")).to_be_visible()
    assert server.parameters() == {"top": "5", "k": "4", "within": "CH", "score": "path"}


def test_a_photo_is_dropped_or_pasted_or_a_sample(server, open_page):
    page = open_page(server.address)
    made = """([data, type, target]) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "given.jpg", { type: "image/jpeg" }));
        const options = { bubbles: true, cancelable: true };
        const event = type === "paste" ? new ClipboardEvent(type, { ...options, clipboardData: transfer })
            : new DragEvent(type, { ...options, dataTransfer: transfer });
        document.querySelector(target).dispatchEvent(event);
    }"""
    for colour, kind, target in (("blue", "drop", "#map"), ("green", "paste", "body")):
        page.evaluate(made, [base64.b64encode(jpeg(colour=colour)).decode(), kind, target])
        expect(page.locator("#result")).to_be_visible()
        assert server.bodies[-1][2] == jpeg(colour=colour)
    page.get_by_role("button", name="Sample photo planet05").click()
    expect(page.locator("#photo-name")).to_have_text("planet05.jpg")
    expect(page.locator("#result")).to_be_visible()
    assert server.bodies[-1][2][:2] == b"\xff\xd8" and len(server.bodies) == 3


def test_a_search_is_stopped_and_another_one_begun(server, open_page):
    gate = threading.Event()
    events, result = made_search(PLACE)
    server.answer = told(events, result, before=lambda step: step != 8 or gate.wait(20))
    page = open_page(server.address)
    choose(page)
    expect(rows(page)).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped after level 2")
    expect(page.locator("#problem")).to_be_hidden()
    gate.set()
    choose(page, jpeg(colour="blue"))
    expect(page.locator("#result")).to_be_visible()
    expect(rows(page)).to_have_count(7)


def test_another_photo_takes_the_place_of_the_one_under_way(server, open_page):
    held, gate = threading.Event(), threading.Event()
    events, result = made_search(PLACE)
    whole = server.answer
    server.answer = told(events, result, before=lambda step: step != 8 or held.wait(20))
    page = open_page(server.address)
    choose(page)
    expect(rows(page)).to_have_count(2)

    def waits(tell):
        gate.wait(20)
        whole(tell)

    server.answer = waits
    choose(page, jpeg(colour="blue"))
    held.set()
    page.wait_for_timeout(300)
    expect(page.locator("#status")).to_have_text("Sending the photo")
    expect(page.locator("#stop")).to_be_visible()
    expect(rows(page)).to_have_count(0)
    gate.set()
    expect(page.locator("#result")).to_be_visible()
    expect(rows(page)).to_have_count(7)


def test_poor_coverage_is_said(server, open_page):
    events, result = made_search(PLACE, coverage=0.25)
    server.answer = told(
        events, result | {"levels_left_out": [18], "within": "CH", "radius_calibrated": True}
    )
    page = open_page(server.address)
    choose(page)
    expect(page.locator("#warnings li").first).to_have_text(
        "At zoom 4 only 25.0 % of the tiles were there: the true place may be among the others."
    )
    expect(page.locator("#warnings li").nth(7)).to_contain_text("no zoom 18")
    expect(page.locator("#warnings li").nth(8)).to_have_text("Only CH was searched.")
    expect(page.locator("#radius-meaning")).to_contain_text("The radius is calibrated")


def test_without_levels_nothing_is_said_of_tiles(server, open_page):
    _, result = made_search(PLACE)
    server.answer = told([], result | {"levels": [], "scoring": {"method": "geoclip", "score": "gallery"}})
    page = open_page(server.address)
    choose(page)
    expect(page.locator("#radius")).to_have_text(
        "Radius: 3.3 km. GeoCLIP’s list of places was compared, and no map tile."
    )
    expect(page.locator("#radius-meaning")).to_contain_text("of what GeoCLIP takes for likely")
    expect(rows(page)).to_have_count(0)


# --- for everybody -----------------------------------------------------------------------------------------


def test_the_keyboard_is_enough(server, open_page):
    page = open_page(server.address)
    expect(page.locator("#about")).to_contain_text("geoengine")
    with page.expect_file_chooser() as chooser:
        for _ in range(10):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "file":
                page.keyboard.press("Enter")
                break
    chooser.value.set_files({"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": jpeg()})
    expect(page.locator("#result")).to_be_visible()
    met = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "(e => [e.id, e.getAttribute('aria-label') || e.textContent])(document.activeElement)"
        )
        met.append(focused[0] or focused[1])
        if focused[1].startswith("Candidate 2"):
            page.keyboard.press("Enter")
        if focused[1].startswith("Zoom 16"):
            break
    assert met.index("map") < met.index("copy") < met.index("download") < len(met) - 1
    expect(page.locator("#candidates button").nth(1)).to_have_attribute("aria-pressed", "true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_accessibility_fault_is_found(server, open_page, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    ).Axe()
    page = open_page(server.address, color_scheme=scheme, accept=["status of 415"])
    page.locator("summary").click()
    found = {"start": axe.run(page)}
    choose(page)
    expect(page.locator("#result")).to_be_visible()
    found["result"] = axe.run(page)
    server.answer = problem(415, "this is no picture")
    choose(page)
    expect(page.locator("#problem")).to_be_visible()
    found["problem"] = axe.run(page)
    page.goto(f"{server.address}/static/responsible-use.html")
    found["use"] = axe.run(page)
    faults = {
        (state, fault["id"], *(str(node["target"]) for node in fault["nodes"]))
        for state, results in found.items()
        for fault in results.response["violations"]
    }
    assert not faults


@pytest.mark.parametrize("width", [320, 390, 800, 1024])
def test_nothing_hangs_over_the_edge(server, open_page, width):
    page = open_page(server.address, viewport={"width": width, "height": 700})
    choose(page)
    expect(page.locator("#result")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    expect(page.locator("#map")).to_be_in_viewport() if width > 800 else None
    box = page.locator("#stage").bounding_box()
    assert box["height"] >= 300 and box["width"] >= min(width - 30, 500)


# --- the real service --------------------------------------------------------------------------------------


def test_the_page_and_the_service_belong_together(open_page, monkeypatch):
    served = pytest.importorskip("served").served
    with served(monkeypatch) as service:
        page = open_page(service.url, accept=["status of 415", "ERR_CONNECTION_REFUSED"])
        expect(page.locator("#about")).to_contain_text("geoengine")
        started = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        print(f"the page answers {started:.0f} ms after it was asked for")
        page.locator("summary").click()
        page.get_by_label("Beam width").select_option("4")
        page.get_by_label("Search only within").fill("-120,30,-110,40")
        page.set_input_files("#file", PHOTOS / "planet01.jpg")
        expect(page.locator("#point")).to_have_text("33.28232° N, 115.58441° W", timeout=60_000)
        expect(rows(page)).to_have_count(7)
        with page.expect_download() as download:
            page.get_by_role("button", name="Download GeoJSON").click()
        response = service.client.post(
            "/v1/locate",
            content=(PHOTOS / "planet01.jpg").read_bytes(),
            params={"k": 4, "top": 5, "within": "-120,30,-110,40"},
            headers={"Accept": "application/geo+json", "Content-Type": "image/jpeg"},
        )
        saved = json.loads(Path(download.value.path()).read_text())
        assert saved == response.json()
        choose(page, b"\xff\xd8 no picture", "bad.jpg")
        expect(page.get_by_role("alert")).to_contain_text("This is not a photo that can be read")
    choose(page)
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
