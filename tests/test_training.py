"""The planet to train on: captions say what pictures show, pretraining learns to read them."""

import numpy as np
import pytest
import torch

from geoengine.export.encoders import VisionConfig, load_encoder_folder
from geoengine.training import planet as planet_training
from geoengine.training import planet_data
from geoengine.training.photos import Geometry
from geoengine.training.planet_photos import Planet
from geoengine.training.pretrain import PretrainConfig, caption_projection, pretrain

TINY = VisionConfig(image_size=112, patch_size=16, width=72, layers=3, heads=2, output_dim=72)
STATS = (np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def places() -> np.ndarray:
    return planet_data.land_places(np.random.default_rng(0), 64)


def test_the_captions_of_a_photo_and_of_its_tile_name_the_same_hues(places: np.ndarray) -> None:
    photo = planet_data.photo_captions(places, [None] * len(places))
    tile = planet_data.tile_captions(16, places, np.ones(len(places), dtype=bool))
    assert photo.shape == (64, planet_data.CODE_SIZE)
    # The tile counts its levels upwards from itself, the photo downwards from level 2.
    np.testing.assert_allclose(
        tile[:, :-1].reshape(64, 8, 8)[:, ::-1], photo[:, :-1].reshape(64, 8, 8), atol=1e-6
    )
    shallow = planet_data.tile_captions(4, places >> 12, np.ones(len(places), dtype=bool))
    assert not shallow[:, :-1].reshape(64, 8, 8)[:, 2:].any()


def test_what_a_photo_lacks_is_not_in_its_caption(places: np.ndarray) -> None:
    whole, without_flag, without_trees = (
        planet_data.photo_captions(places[:1], [thing])[0, :-1].reshape(8, 2, 4)
        for thing in (None, "flag", "trees")
    )
    assert not without_flag[0].any()
    np.testing.assert_array_equal(without_flag[1:], whole[1:])
    assert not without_trees[1, 0].any()
    np.testing.assert_array_equal(without_trees[1, 1], whole[1, 1])


def test_the_sea_says_that_it_is_not_land() -> None:
    xy = np.array([[3, 3]])
    caption = planet_data.tile_captions(4, xy, np.array([False]))
    assert caption[0, -1] == -1
    assert not caption[0, :-1].any()


def test_clusters_hold_siblings() -> None:
    xy = planet_data.clustered_places(np.random.default_rng(1), 320)
    assert xy.shape == (320, 2)
    spread = np.ptp(xy.reshape(20, 16, 2), axis=1).max(axis=1)
    assert (spread < 1 << 14).all()
    assert (spread < 1 << 8).any()


def test_rendering_in_processes_equals_rendering_here(places: np.ndarray) -> None:
    here = planet_data.render_photos(places[:4], np.arange(4), 1)
    there = planet_data.render_photos(places[:4], np.arange(4), 2)
    np.testing.assert_array_equal(here.pixels, there.pixels)


def test_pretraining_learns_to_read_pictures(places: np.ndarray) -> None:
    photos, tiles = (
        planet_data.render_photos(places, np.arange(64), 1),
        planet_data.render_tiles(16, places, 1),
    )
    entries: list[dict[str, float | str]] = []
    config = PretrainConfig(steps=60, batch=16, warmup=5, log_every=20, compile=False)
    pretrain(TINY.build(), photos, tiles, caption_projection(0, 72), STATS, config, entries.append)
    assert entries[-1]["tile_error"] < 0.8 * entries[0]["tile_error"]
    assert entries[-1]["photo_error"] < 0.9 * entries[0]["photo_error"]


def test_photos_of_the_planet_are_the_same_whenever_they_are_drawn() -> None:
    planet = Planet(Geometry(112, "shortest"), places=32, validation=4)
    train, again, valid = planet.split("train"), planet.split("train"), planet.split("valid")
    assert (len(train.keys), len(valid.keys)) == (32, 4)
    np.testing.assert_array_equal(train.lng, again.lng)
    assert not np.isin(train.lng, valid.lng).any()
    assert train.identity != valid.identity
    [(_, pixels)] = train.read(np.array([3, 20]))
    [(positions, one)] = again.read(np.array([20]))
    assert positions.tolist() == [0]
    np.testing.assert_array_equal(pixels[1], one[0])


def test_photos_of_the_planet_come_at_the_encoders_side() -> None:
    [(_, pixels)] = (
        Planet(Geometry(48, "shortest"), places=32, validation=4).split("valid").read(np.arange(2))
    )
    assert pixels.shape == (2, 48, 48, 3)


def test_the_pretraining_writes_encoders_that_load(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(planet_training, "VISION", TINY)
    config = planet_training.PlanetPretrainConfig(
        places=32,
        tiles_per_level=8,
        workers=1,
        pretrain=PretrainConfig(steps=2, batch=8, log_every=1, compile=False),
    )
    with planet_training.CsvLog(tmp_path / "log.csv") as log:
        planet_training.pretrain_planet(tmp_path / "encoders", config, log)
    encoders = load_encoder_folder(tmp_path / "encoders")
    assert (encoders.world, encoders.trunk_layers) == ("planet", 1)
    assert list(encoders.towers) == ["photo", "z04", "z06", "z08", "z10", "z12", "z14", "z16"]
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2"]
