"""The parts of training: heads, losses, negatives, kept rows, shards and the command."""

import errno
import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import refused, run
from made_sets import jpeg, write_tar
from made_tiles import tile_picture
from made_training import VISION, Tiles, write_start

from geoengine.engine.photo_sets import PhotoSetError
from geoengine.engine.tiles import LngLat, Tile, descendants_xy, parent, xy_at
from geoengine.export.encoders import VisionConfig, load_encoder_folder
from geoengine.training.contrastive import (
    Batch,
    bound_scale,
    calibrate_scale,
    compute_gradients,
    contrastive_loss,
    fit_projection,
    smoothed_target,
)
from geoengine.training.errors import TrainingError
from geoengine.training.features import CachedPhotos, CachedTiles, Frozen
from geoengine.training.negatives import drawn, neighbours, pools, siblings, tile_keys, tiles_of_keys
from geoengine.training.photos import Geometry, Shards
from geoengine.training.processes import Processes, choose_precision
from geoengine.training.recipe import Recipe
from geoengine.training.rows import RowStore
from geoengine.training.towers import Head, check_tower, trunk_tokens

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- heads and losses ---------------------------------------------------------------------------------------


def test_trunk_and_head_make_the_tower_and_its_gradients():
    """The head carries only the class token through the last block, and loses nothing by it."""
    tower, images = VISION.build(), torch.randn(3, 3, 16, 16)
    head = Head(tower, 1)
    with torch.no_grad():
        tokens = trunk_tokens(tower, images, 1)
    whole = F.normalize(tower(images), dim=1)
    torch.testing.assert_close(head(tokens), whole)
    weight = torch.randn(3, 12)
    (whole * weight).sum().backward()
    (head(tokens) * weight).sum().backward()
    own = dict(head.named_parameters())
    for name, parameter in tower.named_parameters():
        if name.startswith("transformer.resblocks."):
            number, rest = name.removeprefix("transformer.resblocks.").split(".", 1)
            name = f"blocks.{int(number) - 1}.{rest}"
        if name in own:
            torch.testing.assert_close(own.pop(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert not own


def test_a_head_takes_back_what_it_gave_and_nothing_of_another_model():
    tower = VISION.build()
    head, other = Head(tower, 1), Head(VISION.build(), 1)
    other.load_tower_state(head.tower_state())
    torch.testing.assert_close(other.proj, head.proj, rtol=0, atol=0)
    assert set(head.tower_state()) == {
        name
        for name in tower.state_dict()
        if name.startswith(("transformer.resblocks.1.", "transformer.resblocks.2.", "ln_post.", "proj"))
    }
    wider = VisionConfig(image_size=16, patch_size=8, width=24, layers=3, heads=2, output_dim=12)
    with pytest.raises(TrainingError, match="the checkpoint is of another model"):
        other.load_tower_state(Head(wider.build(), 1).tower_state())


def test_towers_of_other_kinds_are_refused():
    tower = VISION.build()
    check_tower(tower)
    tower.pool_type = "avg"
    with pytest.raises(TrainingError, match="plain vision transformers with a class token"):
        check_tower(tower)
    with pytest.raises(TrainingError, match="this Linear is not one"):
        check_tower(torch.nn.Linear(2, 2))


def test_two_photos_of_one_tile_are_not_each_others_negatives():
    """With every photo in the same tile there is one class, so the loss is zero."""
    photos = F.normalize(torch.randn(5, 12), dim=1)
    tile = F.normalize(torch.randn(1, 12), dim=1)
    loss = contrastive_loss(photos, tile, torch.zeros(5, dtype=torch.int64), torch.tensor(3.0))
    assert float(loss) == 0


def test_the_temperature_is_bounded_as_in_clip_and_comes_back_from_its_bound():
    """CLIP's own weights begin at the bound, where a bound in the loss would leave no gradient."""
    photos, tiles = F.normalize(torch.randn(4, 12), dim=1), F.normalize(torch.randn(6, 12), dim=1)
    scale = torch.nn.Parameter(torch.tensor(9.0))
    bound_scale(scale)
    assert math.exp(float(scale.detach())) == pytest.approx(100.0, rel=1e-5)
    loss = contrastive_loss(photos, tiles, torch.arange(4), scale)
    torch.autograd.backward(loss)
    assert scale.grad is not None and abs(float(scale.grad)) > 0.1


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_step_in_parts_has_the_gradients_of_the_whole(parts):
    head, tokens = Head(VISION.build(), 1), torch.randn(9, 5, 16).half()
    batch = Batch(
        photos=F.normalize(torch.randn(4, 12), dim=1),
        target=torch.tensor([0, 2, 2, 8]),
        tiles=9,
        tokens=lambda part: tokens[part],
    )
    scale = torch.nn.Parameter(torch.tensor(2.0))
    expected = contrastive_loss(batch.photos, head(tokens.float()), batch.target, scale)
    expected.backward()
    whole = [parameter.grad.clone() for parameter in (*head.parameters(), scale)]
    loss = compute_gradients(head, scale, batch, ALONE, parts, "fp32")
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for parameter, grad in zip((*head.parameters(), scale), whole, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


def test_the_fitted_projection_is_the_ridge_solution():
    features, photos = torch.randn(40, 16).double(), torch.randn(40, 12).double()
    weight = (0.1 * features.square().sum(0).mean()).sqrt()
    # Ridge regression is least squares with one more row per feature, of weight sqrt(penalty).
    rows = torch.cat([features, weight * torch.eye(16, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([photos, torch.zeros(16, 12).double()])).solution
    torch.testing.assert_close(
        fit_projection(features, photos, 0.1), expected, atol=1e-6, rtol=0, check_dtype=False
    )


def test_the_calibrated_scale_is_the_one_that_the_choices_were_made_with():
    """Draw the true candidate from the softmax at a known scale: the fit finds that scale again."""
    generator = torch.Generator().manual_seed(0)
    similarities = torch.rand(4000, 16, generator=generator)
    target = torch.multinomial((25 * similarities).softmax(1), 1, generator=generator)[:, 0]
    assert calibrate_scale(similarities, target) == pytest.approx(25, rel=0.05)


def test_smoothed_targets_fall_with_distance_and_least_for_the_own_tile():
    lng, lat = np.array([0.1]), np.array([-0.1])
    own = tile_keys(xy_at(lng, lat, 8))
    keys = np.unique(np.concatenate([own, tile_keys(neighbours(8, xy_at(lng, lat, 8)))[0], [np.uint64(7)]]))
    column = np.searchsorted(keys, own)
    [target] = smoothed_target(8, (lng, lat), keys, column, 0.5)
    assert target.sum() == pytest.approx(1)
    assert target.argmax() == column[0]
    assert target[0] == 0  # far away
    beside = target[keys == tile_keys(xy_at(lng, lat, 8) + np.array([1, 0]))]
    corner = target[keys == tile_keys(xy_at(lng, lat, 8) + np.array([1, -1]))]
    assert 0 < float(corner[0]) < float(beside[0]) < float(target.max())
    [narrow] = smoothed_target(8, (lng, lat), keys, column, 0.01)
    assert narrow[column[0]] == pytest.approx(1, abs=1e-3)


def test_bf16_is_chosen_only_where_it_is_faster(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert (choose_precision("auto", cpu, 768), choose_precision("auto", cpu, 128)) == ("bf16", "fp32")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert (choose_precision("auto", cpu, 768), choose_precision("bf16", cpu, 768)) == ("fp32", "bf16")
    with pytest.raises(TrainingError, match="must be auto, fp32 or bf16"):
        choose_precision("fp8", cpu, 768)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(TrainingError, match="device 'cuda:99' cannot be used here"):
        Processes.join("cuda:99")


# --- negatives ----------------------------------------------------------------------------------------------


def test_siblings_are_the_other_children_of_the_parent():
    xy = np.array([[5, 6], [60, 3]])
    assert [tuple(tile) for tile in tiles_of_keys(tile_keys(xy)).tolist()] == [(5, 6), (60, 3)]
    for (x, y), others in zip(xy.tolist(), siblings(xy).tolist(), strict=True):
        family = {tuple(child) for child in descendants_xy([parent(Tile(6, x, y))[1:]], 4, 6).tolist()}
        assert {tuple(tile) for tile in others} == family - {(x, y)}


def test_neighbours_cross_the_antimeridian_and_end_at_the_poles():
    around = neighbours(4, np.array([[0, 0], [7, 7]]))
    assert {tuple(tile) for tile in around[0].tolist()} == {(0, 0), (15, 0), (15, 1), (0, 1), (1, 0), (1, 1)}
    assert len({tuple(tile) for tile in around[1].tolist()}) == 8


def test_pools_are_the_same_for_a_tile_wherever_it_is_and_are_drawn_in_turn():
    own = tile_keys(np.array([[5, 6], [60, 3], [5, 6]]))
    near, beside = pools(6, own, 4)
    assert near.shape == beside.shape == (3, 4)
    np.testing.assert_array_equal(near[0], near[2])
    assert all(len(set(row)) == 4 for row in near.tolist())
    assert not np.isin(own, near).any()
    taken = np.concatenate([drawn(near, 2, epoch) for epoch in range(2)], axis=1)
    np.testing.assert_array_equal(np.sort(taken), np.sort(near))


# --- kept rows ----------------------------------------------------------------------------------------------


def rows_of(keys):
    return (np.array(keys)[:, None] * np.array([1.0, 0.5])).astype(np.float16)


def keys_of(*keys):
    return np.array(keys, np.uint64)


def test_rows_come_back_whoever_wrote_them(tmp_path):
    with RowStore(tmp_path / "rows", (2,)) as one, RowStore(tmp_path / "rows", (2,)) as other:
        one.add(keys_of(9, 4), rows_of([9, 4]), keys_of(7))
        other.add(keys_of(1), rows_of([1]), keys_of())
    store = RowStore(tmp_path / "rows", (2,))
    assert store.known(keys_of(1, 2, 4, 7, 9)).tolist() == [True, False, True, True, True]
    assert store.present(keys_of(1, 2, 4, 7, 9)).tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(store.get(keys_of(4, 1, 9, 4)), rows_of([4, 1, 9, 4]))
    for key in (2, 7):
        with pytest.raises(KeyError):
            store.get(keys_of(key))


@pytest.mark.parametrize("suffix", [".rows", ".keys"])
@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_part_that_was_cut_off_counts_as_far_as_it_goes(tmp_path, suffix, cut):
    with RowStore(tmp_path, (2,)) as store:
        store.add(keys_of(1, 2, 3), rows_of([1, 2, 3]), keys_of())
    [file] = tmp_path.glob(f"*{suffix}")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - cut)
    store.refresh()
    left = store.known(keys_of(1, 2, 3)).tolist()
    assert left in ([True, True, False], [True, False, False], [False, False, False])
    np.testing.assert_array_equal(store.get(keys_of(1, 2, 3)[left]), rows_of([1, 2, 3])[left])


def test_a_full_disk_is_said_with_what_to_do(tmp_path, monkeypatch):
    store = RowStore(tmp_path, (2,))

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_writer", lambda: (Full(), Full()))
    with pytest.raises(TrainingError, match=r"the disk is full; .* --no-cache"):
        store.add(keys_of(2), rows_of([2]), keys_of())


# --- shards and the command ---------------------------------------------------------------------------------


def prepared(folder, count=24, *, without_place=None):
    """Shards of photos in the east of the world's north, as `geoengine prepare` writes them."""
    rng = np.random.default_rng(3)
    for split, first, photos in (("train", 0, count), ("valid", count, 6)):
        (folder / split).mkdir(parents=True)
        samples = {}
        for i in range(first, first + photos):
            place = {"latitude": float(rng.uniform(1, 60)), "longitude": float(rng.uniform(1, 100))}
            samples[f"p{i:03d}"] = {
                "jpg": jpeg(i * 7 % 256),
                "json": {"author": f"a{i}", **({} if i == without_place else place)},
            }
        write_tar(folder / split / "000000.tar", samples)
    return folder


def test_shards_give_the_photos_their_places_and_the_encoders_square(tmp_path):
    shards = Shards(prepared(tmp_path / "data"), Geometry(16, "shortest"))
    train = shards.split("train")
    assert train.keys.shape == train.lng.shape == (24,)
    assert LngLat(train.lng[0], train.lat[0]) != LngLat(train.lng[1], train.lat[1])
    assert (train.lat <= 60).all() and (train.lng <= 100).all()
    [(positions, pixels)] = train.read(np.array([5, 2]))
    assert positions.tolist() == [0, 1] and pixels.shape == (2, 16, 16, 3)
    [(_, again)] = shards.split("train").read(np.array([2]))
    np.testing.assert_array_equal(again[0], pixels[1])


def test_kept_embeddings_are_of_one_way_to_make_photos_square(tmp_path):
    data, towers = prepared(tmp_path / "data"), load_encoder_folder(write_start(tmp_path / "start")).towers
    alike = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "digest": "d" * 64, "device": torch.device("cpu")}
    frozen = Frozen(tower=towers["photo"], trunk_layers=1, precision="fp32", **alike)
    for mode in ("shortest", "squash"):
        photos = Shards(data, Geometry(frozen.side, mode)).split("valid")
        CachedPhotos(frozen, photos, tmp_path, ALONE, lambda what, done, total: None).prepare()
    assert len(list((tmp_path / "photos").iterdir())) == 2


@pytest.mark.parametrize("change", [{"mean": (0.4,) * 3}, {"std": (0.4,) * 3}])
def test_kept_activations_are_of_one_way_to_normalise_pixels(tmp_path, change):
    """Weights alone do not tell: the same ones with another mean see other pictures."""
    alike = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "digest": "d" * 64, "device": torch.device("cpu")}
    alike |= {"tower": VISION.build(), "trunk_layers": 1, "precision": "fp32"}
    keys, kept = tile_keys(np.array([[3, 4]])), []
    for frozen in (Frozen(**alike), Frozen(**alike | change)):
        tiles = CachedTiles(frozen, Tiles(), tmp_path, ALONE, lambda what, done, total: None)
        tiles.prepare(5, keys)
        kept.append(tiles.tokens(5, keys))
    assert not torch.equal(*kept)


def test_shards_without_coordinates_and_folders_without_shards_are_refused(tmp_path):
    with pytest.raises(PhotoSetError, match="p003"):
        Shards(prepared(tmp_path / "data", without_place=3), Geometry(16, "shortest")).split("train")
    (tmp_path / "data" / "valid" / "000000.tar").unlink()
    with pytest.raises(TrainingError, match=r"has no shards valid/\*\.tar"):
        Shards(tmp_path / "data", Geometry(16, "shortest"))


@pytest.fixture
def earth(tmp_path):
    """Shards, a folder of tiles in which one photo has none, and a model to start from."""
    prepared(tmp_path / "data")
    photos = [Shards(tmp_path / "data", Geometry(16, "shortest")).split(name) for name in ("train", "valid")]
    for zoom in (4, 6):
        xy = np.concatenate([xy_at(split.lng, split.lat, zoom) for split in photos])
        for x, y in xy[1:].tolist():
            file = tmp_path / "tiles" / str(zoom) / str(x) / f"{y}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(tile_picture(zoom, x, y, size=16))
    write_start(tmp_path / "start")
    return tmp_path


def test_the_command_trains_on_shards_and_goes_on_where_it_is_done(earth):
    arguments = ["train", earth / "data", "--tiles", earth / "tiles", "--start", earth / "start"]
    arguments += ["--levels", "4-6", "--epochs", "1", "--batch", "8", "--out", earth / "run"]
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (0, f"{earth / 'run'}\n"), done.stderr
    assert "train: 24 photos\n" in done.stderr
    assert (earth / "run" / "encoders" / "head_z06.safetensors").exists()
    assert (earth / "activations" / "tiles").is_dir()
    again = run(*arguments)
    assert (again.exit_code, "zoom 6: done before" in again.stderr) == (0, True)
    refused(run(*arguments, "--epochs", "2"), "recipe.epochs was 1 and is now 2")


def test_every_part_of_a_recipe_is_an_option_of_the_command(earth):
    values = {"epochs": 1, "batch": 6, "validation_batch": 7, "accumulate": 2, "lr": 3e-4, "scale": 20.0}
    values |= {"projection_rate": 2.0, "weight_decay": 0.01, "schedule": "cosine", "siblings": 2, "pool": 3}
    values |= {"neighbours": 1, "smoothing": 0.5, "ridge": 0.01}
    options = [text for key, value in values.items() for text in (f"--{key.replace('_', '-')}", value)]
    arguments = ["train", earth / "data", "--tiles", earth / "tiles", "--start", earth / "start"]
    done = run(*arguments, "--levels", "4", "--out", earth / "run", "--calibrate", *options)
    assert done.exit_code == 0, done.stderr
    written = json.loads((earth / "run" / "run.json").read_text())
    recipe = {key.removeprefix("recipe."): value for key, value in written.items() if "recipe." in key}
    assert recipe == {"learning_rate": values.pop("lr"), "calibrate": True, **values}
    assert set(recipe) == {field.name for field in fields(Recipe)}


def test_the_command_refuses_what_makes_no_sense(earth):
    data = ["train", earth / "data", "--out", earth / "run"]
    refused(run(*data), "name a source of all zooms with --tiles")
    refused(run(*data, "--tiles", "planet", "--recipe", "best"), "choose paper or geoengine")
    refused(run(*data, "--tiles", "planet", "--schedule", "step"), "schedule must be constant or cosine")
    elsewhere = ["--tiles", "planet", "--start", earth / "start"]
    refused(run(*data, *elsewhere), "of one world, got earth, planet and earth")
    refused(run("train", earth / "none", *elsewhere), "has no shards")
    assert not (earth / "run").exists()
