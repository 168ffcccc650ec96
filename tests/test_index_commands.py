"""`geoengine index`, and `geoengine locate --index`, on the built-in planet."""

import json

import numpy as np
import pytest
from command_line import refused, run
from PIL import Image

from geoengine.commands.terminal import Rate, duration
from geoengine.engine.index import building
from geoengine.engine.index.known_rows import row_cache_folder
from geoengine.engine.sources import planet

PLANET = ("--bundle", "planet", "--threads", 1)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "planet"
    result = run("index", "build", *PLANET, "--zoom", "4", "--out", folder)
    assert result.exit_code == 0, result.stderr
    assert "zoom 4       256 embeddings, 0 tiles missing" in result.stdout and ", complete" in result.stdout
    return folder


def test_an_index_says_what_it_holds_and_is_sound(index):
    for command in ("info", "verify"):
        result = run("index", command, index)
        assert result.exit_code == 0 and "planet-vit/checkpoints, fp32 on" in result.stdout
        assert "area         all tiles\n" in result.stdout
    assert "256 embeddings are sound\n" in result.stdout
    text = run("index", "verify", index, "--sample", 5, "--bundle", "planet").stdout
    assert "5 tiles embedded again: cosine at least 1.0000" in text or "cosine at least 0.999" in text


def test_a_photo_is_located_with_an_index(index, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(planet.photo(20.0, 30.0, 1, height=120)).save(photo)
    arguments = ["locate", "--demo", "--k", 2, "--levels", "4,6", "--json", photo]
    plain = json.loads(run(*arguments).stdout)
    indexed = json.loads(run(*arguments, "--index", index).stdout)
    assert [level["exhaustive"] for level in indexed["levels"]] == [True, False]
    assert [level["known"] for level in indexed["levels"]] == [256, 0]
    for one, other in zip(plain["levels"], indexed["levels"], strict=True):
        np.testing.assert_allclose(
            # Half precision, and cosines are divided by a temperature.
            [tile["score"] for tile in one["beam"]],
            [tile["score"] for tile in other["beam"]],
            atol=0.02,
        )
    text = run(*arguments[:-2], photo, "--index", index).stdout
    assert "all tiles of zoom 4 were scored from the index" in text


def test_merging_and_a_damaged_index(index, tmp_path):
    merged = tmp_path / "merged"
    assert "256 embeddings" in run("index", "merge", index, index, "--out", merged).stdout
    file = merged / "z04.rows"
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    refused(run("index", "verify", merged), "z04.rows: damaged: its SHA-256 is not the one in its header")
    assert run("index", "info", merged).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["build", *PLANET, "--zoom", "5"], "no map encoder for zoom 5"),
        (["build", *PLANET, "--zoom", "x"], "levels are zooms such as 4,6,8"),
        (["build", *PLANET, "--land"], "land is on Earth, and the planet is not"),
        (["build", *PLANET, "--within", "FR"], "FR (France) is on Earth, and the planet is not"),
        (["build", *PLANET, "--within", "Atlantis"], "is no region"),
        (["info", "."], "is no tile index (it has no manifest.json): `geoengine index build` makes one"),
    ],
)
def test_what_is_refused(arguments, sentence):
    refused(run("index", *arguments), sentence)


def test_locate_refuses_what_is_no_index(tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32)).save(photo)
    refused(run("locate", "--demo", photo, "--index", tmp_path), "is no tile index")


def test_rate_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    rate = Rate("tiles")
    assert rate.text(8, 1000, 9000) == ""
    now[0] += 10
    assert rate.text(8, 3000, 9000) == ", 200 tiles/s, 30 s left"
    assert rate.text(10, 0, 10) == ""
    assert [duration(s) for s in (5, 300, 20_000)] == ["5 s", "5 min", "5.6 h"]


def test_where_rows_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GEOENGINE_CACHE", raising=False)
    assert row_cache_folder() == tmp_path / "geoengine" / "rows"
    monkeypatch.setenv("GEOENGINE_CACHE", str(tmp_path / "mine"))
    assert row_cache_folder() == tmp_path / "mine" / "rows"
    monkeypatch.setenv("GEOENGINE_CACHE", "off")
    assert row_cache_folder() is None


def test_an_interrupted_build_says_how_it_goes_on(monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "build_index", interrupted)
    result = run("index", "build", *PLANET, "--zoom", "4", "--out", tmp_path / "a")
    assert result.exit_code == 130
    assert "a: the same command goes on with what is done" in result.stderr
