"""Train the planet's encoders: one photo encoder, seven map encoders, one shared trunk.

`geoengine train planet --out training/weights/planet` reproduces the weights in the repository;
`planet-log.csv` beside them holds the figures of that run. First one ViT learns to caption photos and tiles
alike (`pretrain`). It is the photo encoder from then on, frozen. The map encoders are fine-tuned from it in
the paper's order, zoom 16 first and each next one from the one before: trunk frozen and its tokens computed
once, projection fitted in closed form, last two blocks trained contrastively with siblings as negatives. The
logit scales are calibrated afterwards, on photos held out from all of that.
"""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from geoengine.engine.manifest import PHOTO, encoder_name
from geoengine.engine.tiles import LEVELS
from geoengine.export.encoders import VisionConfig, save_encoder_folder
from geoengine.training import planet_data as data
from geoengine.training.contrastive import (
    FineTuneConfig,
    FineTuneResult,
    PairSet,
    calibrate_scale,
    encode_in_batches,
    fine_tune,
    fit_projection,
)
from geoengine.training.pretrain import Log, PretrainConfig, caption_projection, normalise, pretrain
from geoengine.training.towers import Tower, trunk_tokens

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
TRUNK_LAYERS = 2
MEAN = np.full(3, 0.5, dtype=np.float32)
STD = np.full(3, 0.25, dtype=np.float32)
_CLUSTER = 16

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanetTrainingConfig:
    """How much to render and how long to train; the defaults made the weights in the repository.

    `pretrained` names what an earlier run wrote beside its weights; the caption regression is then left out.
    """

    places: int = 16_000
    tiles_per_level: int = 6_000
    pair_places: int = 6_000
    validation_places: int = 500
    workers: int = 2
    threads: int = 1
    seed: int = 1
    pretrained: Path | None = None
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)


def train_planet(out: Path, config: PlanetTrainingConfig, log: Log) -> None:
    """Render, train and write the planet's encoders to the folder `out` (see `export.encoders`)."""
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    rng = np.random.default_rng(config.seed)
    places = np.concatenate(
        [data.land_places(rng, config.places // 2), data.clustered_places(rng, config.places // 2)]
    )
    photos = data.render_photos(places, config.seed, config.workers)
    tower = VISION.build()
    if config.pretrained is None:
        tiles = _pretraining_tiles(rng, places, config)
        projection = caption_projection(config.seed, VISION.output_dim)
        pretrain(tower.train(), photos, tiles, projection, (MEAN, STD), config.pretrain, log)
        save_file(tower.state_dict(), out.with_name(f"{out.name}-pretrained.safetensors"))
    else:
        tower.load_state_dict(load_file(config.pretrained))
    heads, scales = fine_tune_levels(tower.eval(), places, photos, config, log)
    save_encoder_folder(
        out,
        vision=VISION,
        trunk=tower.state_dict(),
        heads=heads,
        trunk_layers=TRUNK_LAYERS,
        mean=MEAN.tolist(),
        std=STD.tolist(),
        logit_scale=scales,
    )


def fine_tune_levels(
    tower: Tower, places: Int64Array, photos: data.Pictures, config: PlanetTrainingConfig, log: Log
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    """Fine-tune a map encoder per level from the photo encoder; returns state dicts and logit scales."""
    rng = np.random.default_rng(config.seed + 1)
    # The last places are the clusters whose members the levels must tell apart, the first are far apart.
    chosen = np.concatenate(
        [np.arange(config.pair_places // 2), np.arange(len(places) - config.pair_places // 2, len(places))]
    )
    embeddings = F.normalize(embed_photos(tower, photos.pixels[chosen]), dim=1)
    held_out = data.land_places(rng, config.validation_places)
    held_out_photos = data.render_photos(held_out, config.seed + len(places), config.workers)
    held_out_embeddings = F.normalize(embed_photos(tower, held_out_photos.pixels), dim=1)
    heads, scales = {PHOTO: tower.state_dict()}, {}
    current = copy.deepcopy(tower)
    for level in reversed(LEVELS):
        started = time.perf_counter()
        pairs, extra = _pairs(tower, level, places[chosen], embeddings, rng, config)
        fit_projection(current, pairs, TRUNK_LAYERS, config.fine_tune.ridge)
        validation, _ = _pairs(tower, level, held_out, held_out_embeddings, rng, config)
        before = recall_at_1(current, validation)
        result = fine_tune(current, pairs, _batches(rng, pairs, extra), TRUNK_LAYERS, config.fine_tune)
        scale = calibrate_scale(
            *sibling_similarities(tower, current, level, held_out, held_out_embeddings, config)
        )
        _report(log, level, result, before, recall_at_1(current, validation), scale, started)
        heads[encoder_name(level)] = copy.deepcopy(current.state_dict())
        scales[encoder_name(level)] = scale
    return heads, scales


def recall_at_1(tower: Tower, pairs: PairSet) -> float:
    """Share of photos whose own tile is the most similar of all tiles of the set."""
    features = encode_in_batches(tower, pairs.tokens, TRUNK_LAYERS)
    with torch.no_grad():
        tiles = F.normalize(features @ tower.proj, dim=1)
    best = (pairs.photos @ tiles.T).argmax(1)
    return float((best == pairs.tile_of).float().mean())


def sibling_similarities(
    tower: Tower,
    encoder: Tower,
    level: int,
    places: Int64Array,
    photo_embeddings: torch.Tensor,
    config: PlanetTrainingConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score photos against their own tile and its 15 siblings: cosines float[m, 16], true columns int64[m].

    These are what a search has to tell apart at every level but the first. `tower` gives the trunk.
    """
    own = places >> (16 - level)
    inner = np.stack(np.meshgrid(range(4), range(4), indexing="ij"), axis=-1).reshape(16, 2)
    xy = ((own & ~np.int64(3))[:, None] + inner).reshape(-1, 2)
    distinct, row = np.unique(xy, axis=0, return_inverse=True)
    tokens = _tokens(tower, level, distinct, config)
    with torch.no_grad():
        tiles = F.normalize(encode_in_batches(encoder, tokens, TRUNK_LAYERS) @ encoder.proj, dim=1)
    siblings = tiles[torch.from_numpy(row.reshape(-1, 16))]  # (m, 16, d)
    target = torch.from_numpy((own[:, 0] & 3) * 4 + (own[:, 1] & 3))
    return torch.einsum("md,mcd->mc", photo_embeddings, siblings), target


def embed_photos(tower: Tower, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Embed uint8[n, S, S, 3] pictures with the whole tower; float32[n, d], not normalised."""
    with torch.no_grad():
        return torch.cat([tower(images) for images in _images(pixels)])


def _images(pixels: npt.NDArray[np.uint8], size: int = 256) -> Iterator[torch.Tensor]:
    for start in range(0, len(pixels), size):
        yield normalise(pixels[start : start + size], MEAN, STD)


def _pretraining_tiles(
    rng: np.random.Generator, places: Int64Array, config: PlanetTrainingConfig
) -> data.Pictures:
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


def _pairs(
    tower: Tower,
    level: int,
    places: Int64Array,
    photo_embeddings: torch.Tensor,
    rng: np.random.Generator,
    config: PlanetTrainingConfig,
) -> tuple[PairSet, Int64Array]:
    """Return photos with their tiles' trunk tokens, and the rows of further tiles: siblings and the sea."""
    own = places >> (16 - level)
    siblings = (own[rng.permutation(len(own))[: len(own) // 3]] & ~np.int64(3)) + rng.integers(
        0, 4, (len(own) // 3, 2)
    )
    anywhere = rng.integers(0, 1 << level, (len(own) // 20, 2))
    xy, row = np.unique(np.concatenate([own, siblings, anywhere]), axis=0, return_inverse=True)
    row = row.reshape(-1)
    tokens = _tokens(tower, level, xy, config)
    pairs = PairSet(photo_embeddings, tokens, torch.from_numpy(row[: len(own)].copy()))
    return pairs, np.unique(row[len(own) :])


def _tokens(tower: Tower, level: int, xy: Int64Array, config: PlanetTrainingConfig) -> torch.Tensor:
    """Draw tiles and run the trunk on them, float16[n, T, width]; it never changes, so once is enough."""
    pixels = data.render_tiles(level, xy, config.workers).pixels
    with torch.no_grad():
        return torch.cat([trunk_tokens(tower, images, TRUNK_LAYERS).half() for images in _images(pixels)])


def _batches(
    rng: np.random.Generator, pairs: PairSet, extra: Int64Array
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Half of a batch far apart, half in clusters, and negatives without a photo."""
    half = len(pairs.photos) // 2
    while True:
        clusters = half + rng.integers(0, half // _CLUSTER, 6)[:, None] * _CLUSTER + np.arange(_CLUSTER)
        rows = np.concatenate([rng.integers(0, half, 96), clusters.reshape(-1)])
        yield rows, rng.choice(extra, 64)


def _report(
    log: Log, level: int, result: FineTuneResult, before: float, after: float, scale: float, started: float
) -> None:
    figures = {"recall_before": before, "recall_after": after, "calibrated_scale": scale}
    log({"stage": encoder_name(level), **asdict(result), **figures, "seconds": time.perf_counter() - started})


class CsvLog:
    """Writes entries to a CSV file as they come, and prints them."""

    COLUMNS = (
        "stage", "step", "photo_error", "tile_error", "first_loss", "last_loss",
        "logit_scale", "recall_before", "recall_after", "calibrated_scale", "seconds",
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self.COLUMNS)
        self._writer.writeheader()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, entry: dict[str, float | str]) -> None:
        """Write one entry; numbers keep four significant digits."""
        short = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in entry.items()}
        self._writer.writerow(short)
        self._file.flush()
        print(", ".join(f"{key} {value}" for key, value in short.items()), flush=True)
