"""The training chain, small: captions say what pictures show, training learns, the trunk stays as it is."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from geoengine.export.encoders import VisionConfig, load_encoder_folder
from geoengine.training import planet as planet_training
from geoengine.training import planet_data
from geoengine.training.contrastive import FineTuneConfig, PairSet, calibrate_scale, fine_tune, fit_projection
from geoengine.training.pretrain import PretrainConfig, caption_projection, pretrain
from geoengine.training.towers import freeze_trunk, head_features, trunk_tokens

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
    here = planet_data.render_photos(places[:4], 5, 1)
    there = planet_data.render_photos(places[:4], 5, 2)
    np.testing.assert_array_equal(here.pixels, there.pixels)


def test_pretraining_learns_to_read_pictures(places: np.ndarray) -> None:
    photos, tiles = planet_data.render_photos(places, 0, 1), planet_data.render_tiles(16, places, 1)
    entries: list[dict[str, float | str]] = []
    config = PretrainConfig(steps=60, batch=16, warmup=5, log_every=20, compile=False)
    pretrain(TINY.build(), photos, tiles, caption_projection(0, 72), STATS, config, entries.append)
    assert entries[-1]["tile_error"] < 0.8 * entries[0]["tile_error"]
    assert entries[-1]["photo_error"] < 0.9 * entries[0]["photo_error"]


def test_the_two_halves_of_a_tower_make_the_whole() -> None:
    tower, images = TINY.build(), torch.randn(3, 3, 112, 112)
    with torch.no_grad():
        halves = head_features(tower, trunk_tokens(tower, images, 1), 1) @ tower.proj
        torch.testing.assert_close(halves, tower(images))


def test_only_the_head_is_trained() -> None:
    tower = TINY.build()
    names = {id(parameter): name for name, parameter in tower.named_parameters()}
    trained = {names[id(parameter)] for parameter in freeze_trunk(tower, 1)}
    assert {"proj", "ln_post.weight", "ln_post.bias"} < trained
    assert not any(
        name.startswith(("conv1", "ln_pre", "positional", "transformer.resblocks.0.")) for name in trained
    )
    assert any(name.startswith("transformer.resblocks.1.") for name in trained)


def _random_pairs(tower: torch.nn.Module) -> PairSet:
    with torch.no_grad():
        tokens = trunk_tokens(tower, torch.randn(48, 3, 112, 112), 1)
    return PairSet(F.normalize(torch.randn(48, 72), dim=1), tokens, torch.arange(48))


def _recall(tower: torch.nn.Module, pairs: PairSet) -> float:
    with torch.no_grad():
        tiles = F.normalize(head_features(tower, pairs.tokens, 1) @ tower.proj, dim=1)
    return float(((pairs.photos @ tiles.T).argmax(1) == pairs.tile_of).float().mean())


def test_fine_tuning_brings_photos_to_their_tiles_and_leaves_the_trunk_alone() -> None:
    tower = TINY.build()
    trunk = copy.deepcopy(tower.transformer.resblocks[0].state_dict())
    pairs = _random_pairs(tower)
    assert _recall(tower, pairs) < 0.2
    rng = np.random.default_rng(0)
    batches = iter(lambda: (rng.integers(0, 48, 32), np.arange(4)), None)
    config = FineTuneConfig(steps=120, learning_rate=2e-3, projection_learning_rate=5e-3)
    result = fine_tune(tower, pairs, batches, 1, config)
    assert result.last_loss < 0.5 * result.first_loss
    assert _recall(tower, pairs) > 0.8
    for name, tensor in tower.transformer.resblocks[0].state_dict().items():
        torch.testing.assert_close(tensor, trunk[name], rtol=0, atol=0)


def test_two_photos_of_one_tile_are_not_each_others_negatives() -> None:
    """With every photo in the same tile there is one class, so the loss is zero from the first step."""
    tower = TINY.build()
    pairs = _random_pairs(tower)
    same = PairSet(pairs.photos, pairs.tokens, torch.zeros(48, dtype=torch.int64))
    nobody = np.empty(0, dtype=np.int64)
    result = fine_tune(tower, same, iter(lambda: (np.arange(8), nobody), None), 1, FineTuneConfig(steps=2))
    assert result.first_loss == 0


def test_the_fitted_projection_is_the_ridge_solution() -> None:
    tower = TINY.build()
    pairs = _random_pairs(tower)
    fit_projection(tower, pairs, 1, ridge=0.1)
    with torch.no_grad():
        features = head_features(tower, pairs.tokens, 1).double()
        weight = (0.1 * features.square().sum(0).mean()).sqrt()
        # Ridge regression is least squares with one more row per feature, of weight sqrt(penalty).
        rows = torch.cat([features, weight * torch.eye(72, dtype=torch.float64)])
        targets = torch.cat([pairs.photos.double(), torch.zeros(72, 72, dtype=torch.float64)])
        expected = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close(tower.proj.double(), expected, atol=1e-4, rtol=0, check_dtype=False)


def test_the_calibrated_scale_is_the_one_that_the_choices_were_made_with() -> None:
    """Draw the true candidate from the softmax at a known scale: the fit finds that scale again."""
    generator = torch.Generator().manual_seed(0)
    similarities = torch.rand(4000, 16, generator=generator)
    target = torch.multinomial((25 * similarities).softmax(1), 1, generator=generator)[:, 0]
    assert calibrate_scale(similarities, target) == pytest.approx(25, rel=0.05)


def test_siblings_are_scored_with_the_true_one_in_its_place(places: np.ndarray) -> None:
    """A photo embedding equal to its own tile's is most similar to exactly that column."""
    tower = planet_training.VISION.build()
    config = planet_training.PlanetTrainingConfig(workers=1)
    own = tile_embeddings(tower, places, config)
    similarities, target = planet_training.sibling_similarities(tower, tower, 12, places, own, config)
    assert similarities.shape == (64, 16)
    torch.testing.assert_close(similarities.argmax(1), target)


def tile_embeddings(tower, places, config) -> torch.Tensor:
    pixels = planet_data.render_tiles(12, places >> 4, config.workers).pixels
    return F.normalize(planet_training.embed_photos(tower, pixels), dim=1)


def test_the_whole_chain_writes_encoders_that_load(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(planet_training, "VISION", TINY)
    config = planet_training.PlanetTrainingConfig(
        places=64,
        tiles_per_level=8,
        pair_places=64,
        validation_places=8,
        workers=1,
        pretrain=PretrainConfig(steps=2, batch=8, log_every=1, compile=False),
        fine_tune=FineTuneConfig(steps=1),
    )
    with planet_training.CsvLog(tmp_path / "log.csv") as log:
        planet_training.train_planet(tmp_path / "encoders", config, log)
    encoders = load_encoder_folder(tmp_path / "encoders")
    assert encoders.world == "planet"
    assert encoders.trunk_layers == planet_training.TRUNK_LAYERS
    assert list(encoders.towers) == ["photo", "z04", "z06", "z08", "z10", "z12", "z14", "z16"]
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [
        "pretrain",
        "pretrain",
        "z16",
        "z14",
        "z12",
        "z10",
        "z08",
        "z06",
        "z04",
    ]
