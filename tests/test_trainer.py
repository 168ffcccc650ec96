"""The trainer: the same weights whether it was killed, shared, cut in parts or cached, or none of that."""

import csv
import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_training import RECIPE, Data, Photos, Tiles, trainer, write_start
from safetensors.torch import load_file

from geoengine.export.encoders import VisionConfig, load_encoder_folder
from geoengine.training import level_training
from geoengine.training.errors import TrainingError
from geoengine.training.recipe import Recipe, Schedule
from geoengine.training.trainer import TrainConfig

PROGRAM = Path(__file__).with_name("made_training.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the start, the cache and one whole run lie."""
    folder = tmp_path_factory.mktemp("training")
    trainer(folder, "whole").run()
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{z}/{name}": t for z in ("z04", "z06") for name, t in load_file(run / f"{z}.safetensors").items()
    }


def log(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as lines:
        return [
            {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(lines)
        ]


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0, msg=name)


def assert_close(folder: Path, one: Path, other: Path) -> None:
    """Equal but for rounding: the difference is small beside the way that training has gone.

    Adam makes whole steps of the rounding errors of gradients that are zero, so it is not smaller than that.
    """
    start = load_encoder_folder(folder / "start").towers["photo"].state_dict()
    for zoom in ("z06", "z04"):
        states = [load_file(run / f"{zoom}.safetensors") for run in (one, other)]
        scales = [float(state.pop("logit_scale")) for state in states]
        flat = [torch.cat([state[name].flatten() for name in states[0]]) for state in (*states, start)]
        assert float((flat[0] - flat[1]).norm()) < 0.03 * float((flat[0] - flat[2]).norm())
        assert scales[0] == pytest.approx(scales[1], abs=0.02)


def program(folder: Path, out: str, *arguments: object, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, PROGRAM, folder, out, *map(str, arguments)], env=environment)


# --- what a run learns and writes ---------------------------------------------------------------------------


def test_training_brings_photos_to_tiles_that_it_has_not_seen(folder):
    recipe = replace(RECIPE, epochs=6, batch=32)
    trainer(folder, "learning", recipe=recipe, data=Data(train=Photos(160, 3)), log_every=1).run()
    rows = [row for row in log(folder / "learning") if row["level"] == "6"]
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    figures = [row for row in rows if row["recall_1"]]
    assert [row["epoch"] for row in figures] == [str(epoch) for epoch in range(1, 7)]
    last = figures[-1]
    assert float(last["recall_1"]) <= float(last["recall_5"]) <= float(last["recall_10"])
    assert [row["epoch"] for row in rows if row["sibling_recall"]] == ["6"]


def test_a_run_from_a_folder_of_encoders_writes_one_whose_trunk_and_photo_encoder_are_the_old_ones(folder):
    before, after = load_encoder_folder(folder / "start"), load_encoder_folder(folder / "whole" / "encoders")
    assert (after.model, after.world, after.levels) == ("tiny", "earth", (4, 6))
    assert_same(before.towers["photo"].state_dict(), after.towers["photo"].state_dict())
    old, new = (encoders.towers["z06"].state_dict() for encoders in (before, after))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {"proj", "ln_post.weight", "transformer.resblocks.1.attn.in_proj_weight"} <= changed
    assert not any(name.startswith(("conv1", "ln_pre", "transformer.resblocks.0.")) for name in changed)
    scale = load_file(folder / "whole" / "z06.safetensors")["logit_scale"]
    assert after.logit_scale["z06"] == pytest.approx(math.exp(float(scale)))


def test_each_level_starts_from_the_one_before(folder, monkeypatch):
    starts = []
    begin = level_training.LevelTraining.start

    def noted(self):
        starts.append(self._head.tower_state())
        begin(self)

    monkeypatch.setattr(level_training.LevelTraining, "start", noted)
    trainer(folder, "order").run()
    assert_same(weights(folder / "order"), weights(folder / "whole"))
    finished = load_file(folder / "order" / "z06.safetensors")
    assert_same(starts[1], {name: t for name, t in finished.items() if name != "logit_scale"})
    photo = load_encoder_folder(folder / "start").towers["photo"].state_dict()
    assert_same(starts[0], {name: photo[name] for name in starts[0]})


def test_the_papers_recipe_keeps_the_temperature_that_it_learned(folder):
    recipe = Recipe(epochs=1, batch=16)
    trainer(folder, "paper", recipe=recipe).run()
    learned = [float(row["scale"]) for row in log(folder / "paper") if row["scale"]]
    assert learned[0] == pytest.approx(1 / 0.07, rel=1e-3)
    assert (folder / "paper" / "z04.safetensors").exists()
    kept = load_file(folder / "paper" / "z04.safetensors")["logit_scale"]
    assert math.exp(float(kept)) == pytest.approx(learned[-1], rel=1e-4)


def test_a_temperature_that_begins_at_clips_bound_learns_and_never_exceeds_it(folder):
    recipe = Recipe(epochs=1, batch=16, scale=100.0, learning_rate=1e-2)
    trainer(folder, "bound", recipe=recipe).run()
    learned = [float(row["scale"]) for row in log(folder / "bound") if row["scale"]]
    assert learned[-1] < 99 and max(learned) <= 100.001


# --- the same weights, however they are computed ------------------------------------------------------------


def test_parts_of_a_step_give_the_gradient_of_the_whole(folder):
    trainer(folder, "parts", recipe=replace(RECIPE, accumulate=3)).run()
    assert_close(folder, folder / "whole", folder / "parts")


def test_activations_computed_each_time_give_what_kept_ones_give(folder):
    recipe = Recipe(epochs=1, batch=20, learning_rate=2e-3)
    trainer(folder, "kept", recipe=recipe).run()
    trainer(folder, "computed", recipe=recipe, cache=None).run()
    assert_close(folder, folder / "kept", folder / "computed")


def test_kept_activations_are_not_computed_again(folder):
    tiles = Tiles()
    trainer(folder, "again", tiles=tiles).run()
    assert tiles.read_tiles == 0


def test_two_processes_give_the_weights_of_one(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [program(folder, "shared", RANK=rank, **shared) for rank in ("0", "1")]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert_close(folder, folder / "whole", folder / "shared")
    assert log(folder / "shared")[-1]["epoch"] == "2"


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(folder):
    """Killed at its fourth file, in the middle of an epoch."""
    (folder / "killed").mkdir()
    (folder / "killed" / "start").symlink_to(folder / "start")  # a cache of its own, which is cut off too
    assert program(folder / "killed", "run", 4).wait(timeout=300) == -signal.SIGKILL
    assert (folder / "killed" / "run" / "state.safetensors").exists()
    said = []
    trainer(folder / "killed", "run", said=said).run()
    assert any("going on after step" in line for line in said)
    assert_same(weights(folder / "whole"), weights(folder / "killed" / "run"))
    assert log(folder / "killed" / "run") == log(folder / "whole")


@pytest.mark.parametrize("stop", (1, 3, 5, 8, 9))
def test_a_run_stopped_at_any_file_goes_on_to_the_same_weights(folder, monkeypatch, stop):
    class Stopped(BaseException):
        pass

    put, count = Path.replace, [0]

    def counted(path, target):
        count[0] += 1
        if count[0] == stop:
            raise Stopped
        return put(path, target)

    monkeypatch.setattr(Path, "replace", counted)
    with pytest.raises(Stopped):
        trainer(folder, f"stopped-{stop}").run()
    monkeypatch.setattr(Path, "replace", put)
    trainer(folder, f"stopped-{stop}").run()
    assert_same(weights(folder / "whole"), weights(folder / f"stopped-{stop}"))
    assert log(folder / f"stopped-{stop}") == log(folder / "whole")


def test_a_finished_run_given_again_changes_nothing(folder):
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "whole").glob("z*.safetensors")}
    lines = log(folder / "whole")
    trainer(folder, "whole").run()
    assert before == {
        file.name: file.stat().st_mtime_ns for file in (folder / "whole").glob("z*.safetensors")
    }
    assert log(folder / "whole") == lines


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_state(tmp_path, monkeypatch):
    compute, steps = level_training.compute_gradients, [0]

    def broken(*arguments):
        steps[0] += 1
        return math.nan if steps[0] == 5 else compute(*arguments)

    monkeypatch.setattr(level_training, "compute_gradients", broken)
    with pytest.raises(TrainingError, match=r"zoom 6: the loss is no longer a number at step 5 \(epoch 1\)"):
        trainer(tmp_path, "run").run()
    kept = load_file(tmp_path / "run" / "state.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


def test_a_gradient_that_is_not_a_number_never_reaches_the_weights(tmp_path, monkeypatch):
    compute = level_training.compute_gradients

    def broken(head, *arguments):
        loss = compute(head, *arguments)
        head.proj.grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(level_training, "compute_gradients", broken)
    with pytest.raises(TrainingError, match="the gradient is no longer a number at step 1 "):
        trainer(tmp_path, "run").run()


def test_photos_that_cannot_be_read_and_tiles_that_do_not_exist_are_left_out_and_counted(tmp_path):
    def east(zoom, xy):
        return xy[:, 0] >= 3 << (zoom - 2)

    photos, said = Photos(40, 1, unreadable=(3, 5)), []
    trainer(tmp_path, "run", data=Data(train=photos), tiles=Tiles(missing=east), said=said).run()
    listed = tmp_path / "run" / "unreadable-train.txt"
    assert f"train: 40 photos, 2 of which cannot be read and are left out: see {listed}" in said
    assert listed.read_text() == "photo 3\nphoto 5\n"
    there = (photos.lng < 90) & ~np.isin(np.arange(40), (3, 5))
    lacking = 38 - int(there.sum()) + int((Photos(12, 2).lng >= 90).sum())
    rows = [row for row in log(tmp_path / "run") if row["recall_1"]]
    assert {(row["pairs"], row["missing_tiles"]) for row in rows} == {(str(there.sum()), str(lacking))}


def test_a_source_without_any_of_the_tiles_is_refused(tmp_path):
    nothing = Tiles(missing=lambda zoom, xy: np.ones(len(xy), dtype=bool))
    with pytest.raises(TrainingError, match="zoom 6: only 0 of 40 photos have a tile"):
        trainer(tmp_path, "run", tiles=nothing).run()


def test_another_run_in_the_same_folder_is_refused(folder):
    with pytest.raises(TrainingError, match="holds another run: seed was 1 and is now 2"):
        trainer(folder, "whole", seed=2)
    with pytest.raises(TrainingError, match=r"recipe\.batch was 8 and is now 16"):
        trainer(folder, "whole", recipe=replace(RECIPE, batch=16))


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    other = VisionConfig(image_size=16, patch_size=8, width=24, layers=3, heads=2, output_dim=12)
    write_start(tmp_path / "start", other)
    with pytest.raises(TrainingError, match="holds another run: start was"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_bytes((folder / "whole" / "run.json").read_bytes())
        trainer(tmp_path, "run")
    trainer(tmp_path, "other", recipe=replace(RECIPE, epochs=1))
    (tmp_path / "other" / "z06.safetensors").write_bytes((folder / "whole" / "z06.safetensors").read_bytes())
    with pytest.raises(TrainingError, match="the checkpoint is of another model"):
        trainer(tmp_path, "other", recipe=replace(RECIPE, epochs=1)).run()


def test_a_folder_of_other_things_is_not_written_to(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "photo.jpg").touch()
    with pytest.raises(TrainingError, match="holds something else"):
        trainer(tmp_path, "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["photo.jpg"]


def test_damaged_files_are_named(folder, tmp_path):
    trainer(tmp_path, "run")
    (tmp_path / "run" / "state.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(TrainingError, match=r"state\.safetensors is damaged"):
        trainer(tmp_path, "run").run()


def test_tiles_that_may_not_be_kept_are_trained_on_without_a_cache(tmp_path):
    tiles = Tiles()
    tiles.storable = False
    with pytest.raises(TrainingError, match=r"forbid keeping .* train with --no-cache"):
        trainer(tmp_path, "run", tiles=tiles)
    trainer(tmp_path, "run", tiles=tiles, cache=None, recipe=replace(RECIPE, epochs=1)).run()
    assert not (tmp_path / "cache").exists()


def test_photos_and_tiles_of_two_worlds_are_refused(tmp_path):
    tiles = Tiles()
    tiles.world = "planet"
    with pytest.raises(TrainingError, match="must be of one world, got earth, planet and earth"):
        trainer(tmp_path, "run", tiles=tiles)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be more than 0"),
        ({"smoothing": -1.0}, "smoothing must be 0 or more"),
        ({"siblings": 5}, "at most 4 siblings"),
        ({"pool": 9}, "pool must be at most 8"),
        ({"scale": 1000.0}, "at most 100"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes, sentence):
    with pytest.raises(TrainingError, match=sentence):
        Recipe(**changes)


def test_calibration_needs_siblings(tmp_path):
    with pytest.raises(TrainingError, match="calibration needs validation photos"):
        TrainConfig(out=tmp_path, recipe=Recipe(calibrate=True))


def test_the_cosine_schedule_rises_and_falls(folder):
    run = replace(RECIPE, schedule=Schedule.cosine, epochs=4)
    trainer(folder, "cosine", recipe=run, log_every=1).run()
    rates = [
        float(row["learning_rate"]) for row in log(folder / "cosine") if row["level"] == "6" and row["loss"]
    ]
    assert max(rates) == pytest.approx(RECIPE.learning_rate) and rates[-1] < 0.05 * RECIPE.learning_rate
    assert rates.index(max(rates)) <= 2
