import inspect
import json
from importlib.metadata import version

import numpy as np
import pytest
from command_line import refused, run
from made_results import MadeSource, made_location
from PIL import Image
from tiny_bundle import write_tiny_bundle

from geoengine.commands.locate import locate
from geoengine.engine import engine as engine_module
from geoengine.engine.errors import SourceError
from geoengine.engine.photos import Photo, PhotoLimits
from geoengine.engine.preprocess import to_square
from geoengine.engine.render import files
from geoengine.engine.results import HYPOTHESIS
from geoengine.engine.search import SearchConfig
from geoengine.engine.tiles import LngLat


class MadeEngine:
    """Stands in for GeoEngine: notes how it is called, and places every photo at one place."""

    def __init__(self, world="planet"):
        self.source = MadeSource(world=world)
        self.bundle = type("Bundle", (), {"image_size": 8, "world": world, "levels": (4, 6, 8)})
        self.calls = []
        self.opened = None
        self.error = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def prepare(self, photo, *, method):
        return Photo(photo.name, to_square(photo.pixels, self.bundle.image_size))

    def locate(self, photos, *, config, progress):
        if self.error is not None:
            raise self.error
        self.calls.append(([photo.name for photo in photos], config))
        assert all(photo.pixels.shape == (8, 8, 3) for photo in photos), "photos wait as small squares"
        for index, zoom in enumerate(config.levels):
            progress(index, zoom, 1, 2)
        return [
            made_location(photo.name, world=self.source.world, levels=config.levels, top=config.top)
            for photo in photos
        ]


@pytest.fixture
def engine(monkeypatch):
    """A stand-in engine; `engine.opened` is what it was opened with."""
    made = MadeEngine()

    def open_made(bundle, tiles, *, backend, precision, threads, index, row_cache):
        made.kept = (index, row_cache)
        made.opened = (str(bundle), tiles, backend, precision, threads)
        return made

    monkeypatch.setattr(engine_module.GeoEngine, "open", open_made)
    return made


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((20, 30, 3), 99, np.uint8)).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def no_bundles(tmp_path, monkeypatch):
    """Neither the folder that tests run in nor the user's data has a bundle."""
    (tmp_path / "empty" / "folder.html").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


# --- what is printed ---


def test_demo_prints_a_table_that_names_the_world(engine, photo):
    result = run("locate", photo, "--demo")
    assert result.exit_code == 0, result.stderr
    assert "[demo planet, not Earth]" in result.stdout and HYPOTHESIS in result.stdout
    assert result.stderr == ""
    assert engine.opened[1:] == ("planet", "auto", None, None)


def test_json_is_one_object_per_photo(engine, photo):
    result = run("locate", photo, photo, "--demo", "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["photo"] for record in records] == [photo, photo]
    assert {record["world"] for record in records} == {"planet"}


def test_geojson_is_one_collection(engine, photo):
    result = run("locate", photo, photo, "--demo", "--geojson")
    collection = json.loads(result.stdout)
    points = [f for f in collection["features"] if f["geometry"]["type"] == "Point"]
    assert len(points) == 10 and points[0]["properties"]["world"] == "planet"


def test_options_reach_the_engine(engine, photo):
    result = run(
        *("locate", photo, "--demo", "--k", 7, "--levels", "4-8", "--top", 2),
        *("--backend", "onnxruntime-cpu", "--precision", "fp32", "--threads", 1, "--json"),
    )
    [(_, config)] = engine.calls
    assert (config.k, config.levels, config.top) == (7, (4, 6, 8), 2)
    assert engine.opened[2:] == ("onnxruntime-cpu", "fp32", 1)
    assert engine.kept == (None, None), "the demo keeps nothing"
    assert len(json.loads(result.stdout)["candidates"]) == 2


def test_the_defaults_are_those_of_the_library_and_the_bundle(engine, photo):
    run("locate", photo, "--demo")
    [(_, config)] = engine.calls
    assert config == SearchConfig(levels=(4, 6, 8))
    limits = inspect.signature(locate).parameters["max_megapixels"].default * 1e6
    assert limits == PhotoLimits().max_pixels


def test_a_folder_stands_for_its_photos(engine, photo, tmp_path):
    (tmp_path / "notes.txt").write_text("no photo")
    result = run("locate", tmp_path, "--demo", "--json")
    assert json.loads(result.stdout)["photo"] == photo


def test_a_table_stands_for_its_photos(engine, photo, tmp_path):
    table = tmp_path / "photos.csv"
    table.write_text("id,file\nfirst,photo.png\nsecond,nothing.png\n")
    result = run("locate", table, "--demo", "--json")
    assert (result.exit_code, json.loads(result.stdout)["photo"]) == (1, "first")
    assert "nothing.png" in result.stderr and result.stderr.count("\n") == 1
    table.write_text("id,file\n")
    refused(run("locate", table, "--demo"), "there is no photo in what was given")


def test_many_photos_are_searched_in_batches(engine, photo, monkeypatch):
    monkeypatch.setattr("geoengine.engine.bulk.stream.PHOTOS_PER_SEARCH", 2)
    result = run("locate", *[photo] * 5, "--demo", "--json")
    assert [len(names) for names, _ in engine.calls] == [2, 2, 1]
    assert len(result.stdout.splitlines()) == 5


def test_the_map_is_written_with_its_pictures(engine, photo, tmp_path):
    page = tmp_path / "map.html"
    result = run("locate", photo, "--demo", "--json", "--map", page)
    assert (result.exit_code, result.stderr) == (0, f"geoengine: wrote {page}\n")
    assert "data:image/jpeg;base64," in page.read_text("utf-8")
    assert json.loads(result.stdout)["world"] == "planet"


def test_a_map_without_pictures_is_better_than_none(engine, photo, tmp_path, monkeypatch):
    def fail(z, xy):
        raise SourceError("the server is gone")

    engine.source.read = fail
    result = run("locate", photo, "--demo", "--map", tmp_path / "map.html")
    assert result.exit_code == 0
    assert "geoengine: the map has no pictures: the server is gone\n" in result.stderr
    assert (tmp_path / "map.html").exists()


def test_gps_tags_are_read_only_when_asked(engine, photo, monkeypatch):
    def read_gps(data):
        assert asked, "read without being asked"
        return LngLat(-148.2, 38.3)

    monkeypatch.setattr("geoengine.engine.bulk.stream.read_gps", read_gps)
    asked = False
    unasked = run("locate", photo, "--demo")
    assert unasked.exit_code == 0 and "GPS" not in unasked.stdout
    asked = True
    assert (
        "which means nothing: the answer is not on Earth"
        in run("locate", photo, "--demo", "--compare-exif").stdout
    )
    record = json.loads(run("locate", photo, "--demo", "--compare-exif", "--json", "--levels", "4-16").stdout)
    assert record["exif"]["distance_km"] == pytest.approx(111.4, abs=0.5)
    assert record["exif"]["meaningful"] is False


def test_version_and_help():
    assert run("--version").stdout == f"geoengine {version('geoengine')}\n"
    for flag in ("-h", "--help"):
        assert "hypothesis, not a proof" in run("locate", flag).stdout
    assert "Exit status: 0 all photos were located; 1 some were not" in run("locate", "-h").stdout


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--k", "0"], "k must be at least 1, got 0"),
        (["--top", "0"], "top must be at least 1, got 0"),
        (["--levels", "4,x"], "levels are zooms such as 4,6,8 or 4-16, got '4,x'"),
        (["--levels", "4-7"], "a range goes up in steps of two"),
        (["--levels", "8-4"], "a range goes up in steps of two"),
        (["--levels", "6,4"], "levels must increase strictly, got 6, 4"),
        (["--levels", "31"], "zoom 31 does not exist"),
        (["--deadline", "0"], "the deadline must be more than 0 seconds, got 0"),
        (["--within", "5,4,3"], "'5,4,3' is no region"),
        (["--levels", "4-999999998"], "zoom 999999998 does not exist"),
        (["--json", "--geojson"], "--json and --geojson exclude each other"),
        (["--bundle", "engines"], "--demo means --bundle planet --tiles planet already"),
        (["--tiles", "folder"], "--demo means --bundle planet --tiles planet already"),
        (["--max-megapixels", "0"], "--max-megapixels must be above 0, got 0"),
        (["--max-megapixels", "nan"], "--max-megapixels must be above 0, got nan"),
        (["--map", "nowhere/map.html"], "the folder nowhere does not exist"),
        (["--map", "folder.html"], "is a folder; give the name of a file"),
        (["--map", "photo.jpg"], "--map writes an HTML page: give it a name that ends in .html"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(engine, photo, options, sentence):
    refused(run("locate", photo, "--demo", *options), sentence)
    assert engine.calls == []


@pytest.mark.parametrize("options", [["--k", "many"], ["--threads", "x"], ["--no-such-option"]])
def test_options_that_cannot_be_parsed_are_refused(engine, photo, options):
    result = run("locate", photo, "--demo", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr and "Traceback" not in result.stderr


def test_a_photo_is_needed():
    assert run("locate", "--demo").exit_code == 2


def test_without_a_bundle_the_two_commands_that_help_are_named(photo):
    result = run("locate", photo)
    refused(result, "geoengine build-engines --out engines/")
    assert "geoengine locate --demo" in result.stderr


def test_a_bundle_of_earth_needs_tiles(photo, tmp_path):
    folder = write_tiny_bundle(tmp_path / "engines", world="earth")
    refused(run("locate", photo, "--bundle", folder), "--tiles 'https://tiles.example.org/{z}/{x}/{y}.jpg'")


def test_a_damaged_bundle_is_refused(photo, tmp_path):
    folder = write_tiny_bundle(tmp_path / "engines")
    next(folder.rglob("*.onnx")).unlink()
    refused(run("locate", photo, "--bundle", folder), "is missing")


def test_a_level_without_encoder_is_refused(photo, tmp_path):
    folder = write_tiny_bundle(tmp_path / "engines")
    result = run("locate", photo, "--bundle", folder, "--tiles", "planet", "--levels", "1,2")
    refused(result, "no map encoder for level 2")


def test_an_unknown_backend_is_refused(photo, tmp_path):
    folder = write_tiny_bundle(tmp_path / "engines")
    refused(run("locate", photo, "--bundle", folder, "--backend", "magic"), "unknown backend 'magic'")


# --- some photos fail ---


def test_bad_photos_are_reported_and_the_others_located(engine, photo, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no jpeg")
    (tmp_path / "bare").mkdir()
    bad = [tmp_path / "missing.jpg", tmp_path / "broken.jpg", tmp_path / "bare"]
    result = run("locate", *bad, photo, "--demo", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["photo"] == photo
    for path in bad:
        assert f"geoengine: {path}: " in result.stderr
    assert result.stderr.count("\n") == 3


@pytest.mark.parametrize("content", [None, b"", b"no jpeg"])
def test_without_a_single_good_photo_the_status_is_2(engine, tmp_path, content):
    path, page = tmp_path / "a.jpg", tmp_path / "map.html"
    if content is not None:
        path.write_bytes(content)
    result = run("locate", path, "--demo", "--map", page, "--geojson")
    refused(result, str(path))
    assert not page.exists()
    assert engine.calls == []
    assert engine.opened is None or content is not None, "missing files are found before anything is loaded"


def test_large_photos_are_refused(engine, photo):
    refused(run("locate", photo, "--demo", "--max-megapixels", "0.0005"), photo)


def test_a_search_that_fails_ends_in_one_sentence(engine, photo):
    engine.error = SourceError("the tile server\ndoes not answer")
    refused(run("locate", photo, "--demo"), r"the tile server\ndoes not answer")


def test_a_later_search_that_fails_keeps_the_results_before(engine, photo, monkeypatch):
    monkeypatch.setattr("geoengine.engine.bulk.stream.PHOTOS_PER_SEARCH", 1)
    first = engine.locate

    def locate_once(*arguments, **options):
        engine.error = SourceError("gone")  # for the photos after these
        engine.locate = first
        return [made_location(photo.name) for photo in arguments[0]]

    engine.locate = locate_once
    result = run("locate", photo, photo, photo, "--demo", "--json")
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 1)
    assert result.stderr == "geoengine: gone\n"


# --- the terminal ---


def test_an_interrupt_writes_nothing_more(engine, photo, tmp_path):
    engine.error = KeyboardInterrupt()
    result = run("locate", photo, "--demo", "--map", tmp_path / "map.html")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "geoengine: interrupted\n")
    assert not (tmp_path / "map.html").exists()


def test_a_full_disk_is_one_sentence(engine, photo, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    result = run("locate", photo, "--demo", "--json", "--map", tmp_path / "map.html")
    assert result.exit_code == 2
    assert result.stderr.endswith("map.html: cannot be written (No space left on device)\n")
    assert json.loads(result.stdout), "the results are not lost with the map"
