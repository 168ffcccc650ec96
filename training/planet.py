"""Pretraining of the planet's stand-in for CLIP, which its map encoders are fine-tuned from by the trainer.

`geoengine pretrain-planet --out DIR` writes a folder of encoders whose map encoders are the photo encoder
itself. `geoengine train planet --start DIR` goes on from there, as `geoengine train` does from CLIP.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from geoengine.engine.manifest import PHOTO, encoder_name
from geoengine.engine.tiles import LEVELS
from geoengine.export.encoders import VisionConfig, save_encoder_folder
from geoengine.training import planet_data as data
from geoengine.training.pretrain import Log, PretrainConfig, caption_projection, pretrain
from geoengine.training.rows import disk_error
from geoengine.training.start import CLIP_INITIAL_SCALE, TRAINED_LAYERS

VISION = VisionConfig(
    image_size=112,
    patch_size=16,
    width=128,
    layers=4,
    heads=4,
    mlp_ratio=4.0,
    output_dim=128,
    quick_gelu=False,
)
MEAN = np.full(3, 0.5, dtype=np.float32)
STD = np.full(3, 0.25, dtype=np.float32)

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanetPretrainConfig:
    """How much to render and how long to train; the defaults made the photo encoder in the repository."""

    places: int = 16_000
    tiles_per_level: int = 6_000
    workers: int = 2
    threads: int = 1
    seed: int = 1
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)


def pretrain_planet(out: Path, config: PlanetPretrainConfig, log: Log) -> None:
    """Render, train and write the planet's photo encoder to the folder `out` (see `export.encoders`)."""
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    rng = np.random.default_rng(config.seed)
    places = np.concatenate(
        [data.land_places(rng, config.places // 2), data.clustered_places(rng, config.places // 2)]
    )
    photos = data.render_photos(places, config.seed + np.arange(len(places)), config.workers)
    tiles = _tiles(rng, places, config)
    tower = VISION.build().train()
    projection = caption_projection(config.seed, VISION.output_dim)
    pretrain(tower, photos, tiles, projection, (MEAN, STD), config.pretrain, log)
    state = tower.eval().state_dict()
    names = [encoder_name(level) for level in LEVELS]
    save_encoder_folder(
        out,
        vision=VISION,
        trunk=state,
        heads=dict.fromkeys([PHOTO, *names], state),
        trunk_layers=VISION.layers - TRAINED_LAYERS,
        mean=MEAN.tolist(),
        std=STD.tolist(),
        logit_scale=dict.fromkeys(names, CLIP_INITIAL_SCALE),
    )


def _tiles(rng: np.random.Generator, places: Int64Array, config: PlanetPretrainConfig) -> data.Pictures:
    """Tiles of all levels, most on land, one tenth anywhere."""
    parts = []
    for level in LEVELS:
        anywhere = rng.integers(0, 1 << level, (config.tiles_per_level // 10, 2))
        xy = np.unique(np.concatenate([places >> (16 - level), anywhere]), axis=0)
        xy = xy[rng.permutation(len(xy))[: config.tiles_per_level]]
        parts.append(data.render_tiles(level, xy, config.workers))
    return data.Pictures(
        np.concatenate([part.pixels for part in parts]), np.concatenate([part.captions for part in parts])
    )


class CsvLog:
    """Writes the entries of a pretraining to a CSV file as they come, and prints them."""

    COLUMNS = ("step", "photo_error", "tile_error", "seconds")

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise disk_error(path, error) from None
        self._writer = csv.DictWriter(self._file, self.COLUMNS)
        self._writer.writeheader()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, entry: dict[str, float]) -> None:
        """Write one entry; numbers keep four significant digits."""
        short = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in entry.items()}
        self._writer.writerow(short)
        self._file.flush()
        print(", ".join(f"{key} {value}" for key, value in short.items()), flush=True)
