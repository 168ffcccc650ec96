import base64
import io
import itertools
import json
import re
import stat

import numpy as np
import pytest
from made_results import MadeSource, made_location
from PIL import Image

from geoengine.engine.errors import GeoEngineError
from geoengine.engine.render import files
from geoengine.engine.render.backdrop import (
    MAX_DETAILED_PHOTOS,
    MAX_JPEG_BYTES,
    Backdrop,
    Region,
    level_regions,
    read_backdrops,
)
from geoengine.engine.render.files import check_writable, write_atomically
from geoengine.engine.render.html_map import html_map
from geoengine.engine.results import HYPOTHESIS
from geoengine.engine.tiles import tile_at


def embedded(page):
    """The data of a page, as its script reads it."""
    [text] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_holds_the_results():
    data = embedded(html_map([made_location("a.jpg"), made_location("b.jpg", world="earth")]))
    assert [photo["photo"] for photo in data["photos"]] == ["a.jpg", "b.jpg"]
    assert [photo["world"] for photo in data["photos"]] == ["planet", "earth"]
    assert data["photos"][0]["note"] == HYPOTHESIS
    assert [level["zoom"] for level in data["photos"][0]["levels"]] == [4, 6, 8, 10, 12, 14, 16]
    assert data["images"] == []


def test_the_page_needs_no_network():
    page = html_map([made_location()])
    assert "default-src 'none'; img-src data:" in page
    assert (
        re.findall(r"(?:src|href)\s*=\s*[\"']|url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(", page) == []
    )
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    "name",
    ["</script><script>alert(1)</script>.jpg", "<!--.jpg", '"&quot;\u2028.jpg', "__STYLE____DATA__", "\\1"],
)
def test_no_file_name_can_leave_the_data(name):
    plain, page = html_map([made_location("plain")]), html_map([made_location(name)])
    assert embedded(page)["photos"][0]["photo"] == name.rpartition("/")[2]
    for mark in ("<script", "</script", "<!--", "<style"):
        assert page.count(mark) == plain.count(mark)


def test_every_part_of_the_template_is_filled_in():
    page = html_map([made_location()])
    assert not re.search(r"__[A-Z]+__", page)
    assert page.count("<style>") == page.count("</style>") == 1
    for wanted in ('"use strict"', "prefers-color-scheme: dark", "Demo planet, not Earth", 'id="copy"'):
        assert wanted in page


def test_the_page_names_the_file_but_not_its_folder():
    page = html_map([made_location("/home/alice/trip/IMG 1.jpg")])
    assert embedded(page)["photos"][0]["photo"] == "IMG 1.jpg"
    assert "alice" not in page


def test_a_page_needs_a_photo():
    with pytest.raises(ValueError, match="at least one"):
        html_map([])


def test_pictures_are_embedded_as_jpeg():
    backdrops = read_backdrops([made_location()], MadeSource())
    images = embedded(html_map([made_location()], backdrops=backdrops))["images"]
    assert len(images) == 7
    assert images[0]["box"] == [0, 0, 1, 1]
    for image, backdrop in zip(images, backdrops, strict=True):
        kind, encoded = image["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        assert base64.b64decode(encoded) == backdrop.jpeg


def test_the_regions_hold_the_kept_tile_with_half_of_it_around():
    location = made_location()
    for before, region in zip(location.levels, level_regions(location, large_tiles=False), strict=False):
        kept = before.beam[0].tile
        left, top, right, bottom = (edge * 2**kept.z for edge in region.box)
        assert (left, top, right, bottom) == (kept.x - 0.5, kept.y - 0.5, kept.x + 1.5, kept.y + 1.5)
        assert (region.z, region.columns, region.rows) == (kept.z + 2, 8, 8)
    assert [region.z for region in level_regions(location, large_tiles=True)] == [5, 7, 9, 11, 13, 15]
    assert {(region.columns, region.rows) for region in level_regions(location, large_tiles=True)} == {(4, 4)}


@pytest.mark.parametrize("levels", [(4, 5, 6), (0, 1), (2, 9), (16,)])
def test_any_levels_have_regions_within_the_rows_of_the_map(levels):
    for lat, large in itertools.product((-85, 0, 85), (False, True)):
        for region in level_regions(made_location(lat=lat, lng=180, levels=levels), large):
            assert region.y0 >= 0 and region.y0 + region.rows <= 2**region.z
            assert 1 <= region.columns <= 2**region.z and region.rows >= 1


def test_a_mosaic_puts_every_tile_in_its_place_round_the_antimeridian():
    location = made_location(lng=179.99, lat=10.0, levels=(4, 6))
    source = MadeSource()
    region = next(level_regions(location, large_tiles=False))
    backdrop = read_backdrops([location], source)[1]
    assert backdrop.region == region and region.x0 + region.columns > 2**6
    picture = np.asarray(Image.open(io.BytesIO(backdrop.jpeg)), dtype=np.int64)
    assert picture.shape == (8 * 16, 8 * 16, 3)
    for column, row in itertools.product(range(8), range(8)):
        seen = picture[row * 16 + 8, column * 16 + 8]
        expected = source.colour(6, (region.x0 + column) % 64, region.y0 + row)
        assert np.abs(seen - expected).max() < 12, "but for JPEG's loss"


def test_missing_tiles_are_grey_and_empty_regions_left_out():
    true_tile = tile_at(made_location().point, 6)
    source = MadeSource(missing=lambda z, x, y: z > 6 or (z == 6 and (x, y) != true_tile[1:]))
    world, only = read_backdrops([made_location()], source)
    assert (world.region.z, only.region.z) == (3, 6)
    picture = np.asarray(Image.open(io.BytesIO(only.jpeg)), dtype=np.int64)
    grey = np.abs(picture - 128).max(axis=2) < 8
    assert 0.9 < grey.mean() < 1.0


def test_large_tiles_are_read_one_zoom_coarser():
    source = MadeSource(tile_size=256)
    read_backdrops([made_location()], source)
    assert [(z, len(xy)) for z, xy in source.asked] == [(2, 16)] + [(z, 16) for z in (5, 7, 9, 11, 13, 15)]


def test_the_pictures_of_many_photos_stay_within_the_budget():
    locations = [made_location(f"{i}.jpg", lng=-175.0 + 22.5 * i, levels=(4, 6, 8)) for i in range(16)]
    backdrops = read_backdrops(locations, MadeSource(tile_size=64, noisy=True))
    assert len(backdrops) == 1 + 2 * MAX_DETAILED_PHOTOS
    assert sum(len(backdrop.jpeg) for backdrop in backdrops) <= MAX_JPEG_BYTES
    assert len(html_map(locations, backdrops=backdrops)) < 2_100_000


def test_photos_of_one_place_share_their_pictures():
    assert len(read_backdrops([made_location("a"), made_location("b")], MadeSource())) == 7


def test_a_backdrop_knows_where_it_lies():
    assert Backdrop(Region(3, -1, 2, 4, 2), b"").region.box == (-1 / 8, 2 / 8, 3 / 8, 4 / 8)


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "map.html"
    write_atomically(path, "Zürich")
    assert path.read_text("utf-8") == "Zürich"
    write_atomically(path, "again")
    assert [file.name for file in tmp_path.iterdir()] == ["map.html"]
    assert path.read_text("utf-8") == "again"


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), GeoEngineError)],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure, raised):
    path = tmp_path / "map.html"
    path.write_text("old")

    def fail(descriptor):
        raise failure

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(raised) as caught:
        write_atomically(path, "new")
    assert raised is KeyboardInterrupt or "map.html: cannot be written (No space left on" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["map.html"]
    assert path.read_text() == "old"


def test_places_that_cannot_be_written_are_found_before_the_search(tmp_path, monkeypatch):
    check_writable(tmp_path / "new.html")
    with pytest.raises(GeoEngineError, match="is a folder; give the name of a file"):
        check_writable(tmp_path)
    with pytest.raises(GeoEngineError, match=r"the folder .*nowhere does not exist"):
        check_writable(tmp_path / "nowhere" / "map.html")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(GeoEngineError, match="no permission to write there"):
        check_writable(tmp_path / "map.html")


def test_a_written_page_can_be_read_as_other_files_of_the_user(tmp_path):
    write_atomically(tmp_path / "map.html", "")
    (tmp_path / "other").write_text("")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("map.html", "other")}
    assert len(modes) == 1
