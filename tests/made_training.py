"""A small world to train on: pictures made from addresses, and a model of a few thousand weights.

Run as a program, `python tests/made_training.py OUT CACHE [KILL_AT]` trains it, and kills itself at the
KILL_AT-th file that it would put in place.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from geoengine.engine.sources import WORLD_BOUNDS, TileBatch
from geoengine.engine.tiles import xy_at
from geoengine.export.encoders import VisionConfig, save_encoder_folder
from geoengine.training.processes import Processes
from geoengine.training.recipe import Recipe, Schedule
from geoengine.training.start import start_from_folder
from geoengine.training.trainer import TrainConfig, Trainer

VISION = VisionConfig(image_size=16, patch_size=8, width=16, layers=3, heads=2, output_dim=12)
SIDE = 16
RECIPE = Recipe(
    epochs=2,
    batch=8,
    validation_batch=8,
    learning_rate=2e-3,
    projection_rate=4.0,
    weight_decay=0.02,
    schedule=Schedule.cosine,
    siblings=1,
    neighbours=1,
    ridge=1e-3,
    calibrate=True,
)


def pictures(zoom, xy, seeds=()):
    """Two colours that say where a tile is in its parent and the one above; uint8[n, 16, 16, 3].

    Each is disturbed by noise from its seed, if there are seeds.
    """
    made = np.empty((len(xy), SIDE, SIDE, 3), np.uint8)
    for i, (x, y) in enumerate(np.asarray(xy).tolist()):
        made[i, :8] = [x % 16 * 16, y % 16 * 16, 40]
        made[i, 8:] = [x // 16 % 16 * 16, y // 16 % 16 * 16, 200]
    for i, seed in enumerate(seeds):
        noise = np.random.default_rng(seed).integers(-9, 10, made[i].shape)
        made[i] = np.clip(made[i].astype(np.int64) + noise, 0, 255)
    return made


class Tiles:
    """A source of those pictures; `missing` says which tiles of a zoom do not exist."""

    name, world, attribution, tile_size, identity = "made", "earth", "", SIDE, "made-tiles"
    min_zoom, max_zoom, bounds, storable = 0, 16, WORLD_BOUNDS, True

    def __init__(self, missing=lambda zoom, xy: np.zeros(len(xy), dtype=bool)):
        self.missing, self.read_tiles = missing, 0

    def read(self, zoom, xy):
        there = np.flatnonzero(~self.missing(zoom, xy))
        self.read_tiles += len(there)
        for part in np.array_split(there[::-1], 3):  # in any order, in chunks
            if len(part):
                yield TileBatch(part, pictures(zoom, xy[part]))

    def close(self):
        pass


class Photos:
    """Photos that look like the zoom-6 tile of their place; those of `unreadable` rows cannot be read."""

    def __init__(self, count, seed, unreadable=()):
        rng = np.random.default_rng(seed)
        self.keys = np.arange(count, dtype=np.uint64)
        self.lng, self.lat = rng.uniform(-170, 170, count), rng.uniform(-60, 60, count)
        self.identity, self.unreadable = f"made-{count}-{seed}", unreadable

    def called(self, row):
        return f"photo {row}"

    def read(self, rows):
        for start in range(0, len(rows), 5):
            part = rows[start : start + 5]
            there = np.array([row not in self.unreadable for row in part.tolist()])
            xy = xy_at(self.lng[part], self.lat[part], 6)
            if there.any():
                yield start + np.flatnonzero(there), pictures(6, xy, part.tolist())[there]


class Data:
    name, world = "made", "earth"

    def __init__(self, train=None, valid=None):
        self.parts = {"train": train or Photos(40, 1), "valid": valid or Photos(12, 2)}

    def split(self, name):
        return self.parts[name]


def write_start(folder, vision=VISION, seed=0):
    """A folder of encoders with random weights."""
    torch.manual_seed(seed)
    state = vision.build().state_dict()
    names = ["photo", "z04", "z06"]
    save_encoder_folder(
        folder,
        vision=vision,
        trunk=state,
        heads=dict.fromkeys(names, state),
        trunk_layers=1,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        logit_scale={"z04": 10.0, "z06": 10.0},
        model="tiny",
        world="earth",
    )
    return folder


def trainer(folder, out, *, recipe=RECIPE, data=None, tiles=None, said=None, processes=None, **options):
    """A trainer of zooms 6 and 4, with a cache in `folder`."""
    torch.set_num_threads(1)
    start = folder / "start"
    if not start.exists():
        write_start(start)
    settings = {"cache": folder / "cache", "sibling_photos": 12, "save_every": 3, "log_every": 2}
    return Trainer(
        start_from_folder(start),
        data or Data(),
        tiles or Tiles(),
        TrainConfig(out=folder / out, recipe=recipe, levels=(4, 6), **{**settings, **options}),
        processes=processes or Processes(0, 1, torch.device("cpu")),
        say=(lambda line: None) if said is None else said.append,
        progress=lambda what, done, total: None,
    )


def kill_at(number):
    """Have the process killed instead of putting its `number`-th file in place."""
    replace_file, count = Path.replace, [0]

    def counted(path, target):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace_file(path, target)

    Path.replace = counted


if __name__ == "__main__":
    base, name, *number = sys.argv[1:]
    if number:
        kill_at(int(number[0]))
    with Processes.join("cpu") as together:
        trainer(Path(base), name, processes=together).run()
