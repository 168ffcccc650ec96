"""The whole chain on the built-in planet, with the encoders that the package brings."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from geoengine import GeoEngine, LngLat, SearchConfig
from geoengine.cli import app
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.sources import planet
from geoengine.engine.tiles import great_circle_km

ROOT = Path(__file__).parent.parent
PHOTOS = Path(__file__).parent / "data" / "photos"


def places() -> dict[str, LngLat]:
    with (PHOTOS / "places.csv").open(newline="") as file:
        return {
            row["photo"]: LngLat(float(row["longitude"]), float(row["latitude"]))
            for row in csv.DictReader(file)
        }


@pytest.fixture(scope="module")
def engine():
    with GeoEngine.open("planet", tiles="planet", threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def located(engine):
    return engine.locate([PHOTOS / name for name in places()], config=SearchConfig(k=4))


def test_the_sample_photos_are_twelve_small_jpegs_of_places_on_land():
    truth = places()
    assert len(truth) == 12
    assert sum((PHOTOS / name).stat().st_size for name in truth) < 1_000_000
    for name, point in truth.items():
        assert planet.is_land(*point).all()
        with Image.open(PHOTOS / name) as picture:
            assert not picture.getexif()


def test_most_sample_photos_are_found(located):
    off = [
        great_circle_km(location.point, truth)
        for location, truth in zip(located, places().values(), strict=True)
    ]
    assert np.mean(np.array(off) <= 1) >= 0.5, off


def test_a_photo_on_its_own_gets_the_same_answer(engine, located):
    name = next(iter(places()))
    [alone] = engine.locate([PHOTOS / name], config=SearchConfig(k=4))
    assert alone.candidates == located[0].candidates
    assert alone.levels == located[0].levels


def test_an_answer_says_that_it_is_about_the_planet(located):
    assert {location.world for location in located} == {"planet"}
    assert all(level.missing == 0 for location in located for level in location.levels)
    assert [level.zoom for level in located[0].levels] == [4, 6, 8, 10, 12, 14, 16]


def test_an_embedding_does_not_depend_on_its_batch(engine):
    """Alone, first and last in a full batch, for the photo encoder and two map encoders, on real tiles."""
    from geoengine.engine.backends import open_backend

    xy = np.random.default_rng(3).integers(0, 1 << 8, (40, 2))
    [first, second] = [batch.pixels for batch in planet.PlanetSource().read(8, xy)]
    tiles = np.concatenate([first, second])
    backend = open_backend(EngineBundle.open("planet"), threads=1)
    try:
        for encoder in ("photo", "z04", "z16"):
            together = backend.encode(encoder, tiles)
            for row in (0, 17, 39):
                alone = backend.encode(encoder, tiles[row : row + 1])[0]
                np.testing.assert_allclose(together[row], alone, atol=1e-6)
            np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    finally:
        backend.close()


def test_the_bundle_was_made_from_the_weights_in_the_repository():
    import torch

    from geoengine.engine.backends import open_backend
    from geoengine.export.encoders import load_encoder_folder

    encoders = load_encoder_folder(ROOT / "training" / "weights" / "planet")
    bundle = EngineBundle.open("planet")
    tiles = np.stack([planet.tile(10, x, 400, size=planet.TILE_SIZE) for x in range(100, 108)])
    images = (torch.from_numpy(tiles).float() / 255 - torch.tensor(encoders.mean)) / torch.tensor(
        encoders.std
    )
    backend = open_backend(bundle, threads=1)
    try:
        for name, tower in encoders.towers.items():
            with torch.no_grad():
                expected = torch.nn.functional.normalize(tower(images.permute(0, 3, 1, 2)), dim=1).numpy()
            assert (expected * backend.encode(name, tiles)).sum(axis=1).min() > 0.9999
    finally:
        backend.close()
    assert min(figures["min_cosine"] for figures in bundle.manifest.parity["fp32"].values()) > 0.9999


def test_the_weights_and_the_bundle_are_small():
    for folder in (ROOT / "training" / "weights" / "planet", ROOT / "engine" / "data" / "planet"):
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 10_000_000


def test_the_demo_from_the_command_line(tmp_path):
    name, truth = next(iter(places().items()))
    page = tmp_path / "answer.html"
    arguments = ["locate", "--demo", "--k", "4", "--json", "--map", str(page), str(PHOTOS / name)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["world"] == "planet"
    assert "planet" in page.read_text()
    assert great_circle_km(LngLat(answer["longitude"], answer["latitude"]), truth) < 1
