"""Training of the map encoders, finest zoom first: each is fine-tuned from the one before (3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from geoengine.engine.manifest import encoder_name
from geoengine.engine.sources import TileSource
from geoengine.engine.tiles import LEVELS
from geoengine.training.contrastive import calibrate_scale
from geoengine.training.errors import TrainingError
from geoengine.training.features import (
    CachedPhotos,
    CachedTiles,
    ComputedPhotos,
    ComputedTiles,
    Frozen,
    PhotoFeatures,
    Progress,
    TileFeatures,
    check_room,
)
from geoengine.training.level_training import STATE, LevelTraining, Setting
from geoengine.training.levels import make_pairs, needed_tiles, own_tiles
from geoengine.training.negatives import Keys
from geoengine.training.photos import Data, Photos
from geoengine.training.processes import Processes, choose_precision
from geoengine.training.recipe import MAX_SCALE, Recipe
from geoengine.training.start import Start, log_scale_of, write_encoders
from geoengine.training.state import RunFolder, Tensors
from geoengine.training.towers import Head
from geoengine.training.validation import (
    RANKS,
    ValidationSet,
    sibling_keys,
    sibling_similarities,
    validate,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training run: where to, which levels, and how it is computed.

    `cache` is the folder of frozen activations, None to compute them each time. `sibling_photos` is how many
    validation photos are also scored against the siblings of their tiles, which have to be read for that.
    A run goes on after a kill from its last state, which is written every `save_every` steps and after each
    epoch; the loss of `log_every` steps makes a line of the log.
    """

    out: Path
    recipe: Recipe
    levels: tuple[int, ...] = LEVELS
    seed: int = 1
    precision: str = "auto"
    cache: Path | None = None
    sibling_photos: int = 0
    save_every: int = 200
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("save_every", "log_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0 or self.sibling_photos < 0:
            raise TrainingError(
                f"seed and sibling_photos must be 0 or more: {self.seed}, {self.sibling_photos}"
            )
        if self.recipe.calibrate and not self.sibling_photos:
            raise TrainingError("calibration needs validation photos with siblings, and sibling_photos is 0")


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """A split's photos, their embeddings, and which of them can be read, bool[m]."""

    photos: Photos
    embeddings: PhotoFeatures
    readable: npt.NDArray[np.bool_]


class Trainer:
    """Trains the map encoders of `config.levels` on the photos of `data` and the tiles of `source`.

    All processes of a torchrun make one. `frozen` are the layers that stay as they are, and `tiles` what they
    make of the tiles. `say` gets lines for people, `progress` how far long steps are.
    Raises TrainingError for parts that do not fit together, and for a folder that holds another run.
    """

    def __init__(
        self,
        start: Start,
        data: Data,
        source: TileSource,
        config: TrainConfig,
        *,
        processes: Processes,
        say: Callable[[str], None],
        progress: Progress,
    ) -> None:
        if not data.world == source.world == start.encoders.world:
            raise TrainingError(
                f"photos, tiles and starting model must be of one world, got {data.world}, {source.world} "
                f"and {start.encoders.world}: choose --tiles, and --start or --model, to match"
            )
        self._start, self._config, self._processes = start, config, processes
        self._say, self._progress = say, progress
        width = int(start.tower.positional_embedding.shape[1])
        digest = start.digest
        self.frozen = Frozen(
            tower=start.tower.to(processes.device),
            trunk_layers=start.trunk_layers,
            mean=start.encoders.mean,
            std=start.encoders.std,
            digest=digest,
            device=processes.device,
            precision=choose_precision(config.precision, processes.device, width),
        )
        self._photos = {name: data.split(name) for name in ("train", "valid")}
        self.tiles: TileFeatures = (
            ComputedTiles(self.frozen, source)
            if config.cache is None
            else CachedTiles(self.frozen, source, config.cache, processes, progress)
        )
        identity = self._identity(source.identity)
        self._setting = Setting(
            recipe=config.recipe,
            seed=config.seed,
            precision=self.frozen.precision,
            save_every=config.save_every,
            log_every=config.log_every,
            processes=processes,
            tiles=self.tiles,
            folder=RunFolder(config.out, identity, writes=processes.first),
        )

    def embed_photos(self, photos: Photos) -> torch.Tensor:
        """Return the unit embeddings, float32[m, d], of photos that can all be read."""
        embeddings = self._photo_features(photos)
        embeddings.prepare()
        return embeddings.embeddings(np.arange(len(photos.keys)))

    def run(self) -> None:
        """Train all levels that are not done yet, and write the encoders; `state.py` says which files.

        Raises TrainingError when a loss is not finite, when the disk is full, and for damaged files.
        """
        folder, zooms = self._setting.folder, sorted(self._config.levels, reverse=True)
        head = Head(self._start.tower, self._start.trunk_layers).to(self._processes.device)
        scale = self._config.recipe.scale or min(self._start.scale, MAX_SCALE)
        log_scale = nn.Parameter(log_scale_of(scale).to(self._processes.device))
        done = {zoom: level for zoom in zooms if (level := folder.load(encoder_name(zoom))) is not None}
        state = folder.load(STATE)
        if state is not None and state[1]["level"] in done:
            state = None  # killed just before it was deleted
        folder.rewind_log(_position(state, list(done)))
        todo = [zoom for zoom in zooms if zoom not in done]
        if todo:
            self._check_room(todo)
            splits = {name: self._open_split(name) for name in self._photos}
        for zoom in zooms:
            if zoom in done:
                tensors, figures = done[zoom]
                head.load_tower_state({name: t for name, t in tensors.items() if name != "logit_scale"})
                log_scale.data.fill_(figures["learned_log_scale"])
                self._say(f"zoom {zoom}: done before")
            else:
                own = state if state is not None and state[1]["level"] == zoom else None
                self._train_level(zoom, head, log_scale, splits, own)
        if self._start.folder is not None and self._processes.first:
            self._write_folder(zooms)
        self._processes.wait()

    def _train_level(
        self,
        zoom: int,
        head: Head,
        log_scale: nn.Parameter,
        splits: Mapping[str, _Split],
        state: tuple[Tensors, dict[str, Any]] | None,
    ) -> None:
        recipe = self._config.recipe
        self.tiles.prepare(zoom, self._needed(zoom))
        train, held_out = splits["train"], splits["valid"]
        pairs = make_pairs(zoom, train.photos, train.readable, self.tiles, recipe)
        valid_pairs = make_pairs(zoom, held_out.photos, held_out.readable, self.tiles, None)
        valid = ValidationSet(
            zoom=zoom,
            photos=held_out.embeddings.embeddings(valid_pairs.rows),
            own=valid_pairs.own,
            with_siblings=self._config.sibling_photos,
        )
        level = LevelTraining(self._setting, pairs, train.photos, train.embeddings, head, log_scale)
        if state is None:
            level.start()
        else:
            level.resume(*state)
            self._say(f"zoom {zoom}: going on after step {level.step}")
        while level.epochs_done < recipe.epochs:
            level.run_epoch()
            self._validate(level, head, log_scale, valid, pairs.dropped + valid_pairs.dropped)
            level.save()
        self._finish(level, head, log_scale, valid)

    def _finish(
        self, level: LevelTraining, head: Head, log_scale: nn.Parameter, valid: ValidationSet
    ) -> None:
        """Write the file of a level that is done, with the temperature that the recipe wants."""
        folder, zoom, log = self._setting.folder, valid.zoom, float(log_scale.detach())
        figures = {"scale": min(math.exp(log), MAX_SCALE), "learned_log_scale": log}
        if valid.with_siblings and self._processes.first:
            similarity, target = sibling_similarities(head, self.tiles, valid, self.frozen.precision)
            figures["sibling_recall"] = float((similarity.argmax(1) == target).float().mean())
            if self._config.recipe.calibrate:
                figures["scale"] = calibrate_scale(similarity, target)
            self._say(f"zoom {zoom}: own tile first of its parent's {figures['sibling_recall']:.1%}")
        # Logged as one step more than the last state, so that a run that goes on from there logs it anew.
        entry: dict[str, float | int | str] = {
            name: figures[name] for name in ("scale", "sibling_recall") if name in figures
        }
        folder.log(
            {
                "level": zoom,
                "epoch": level.epochs_done,
                "step": level.step + 1,
                "seconds": level.seconds,
                **entry,
            }
        )
        tensors = {**head.tower_state(), "logit_scale": log_scale_of(figures["scale"])}
        folder.save(encoder_name(zoom), tensors, figures)
        folder.remove(STATE)

    def _validate(
        self, level: LevelTraining, head: Head, log_scale: nn.Parameter, valid: ValidationSet, dropped: int
    ) -> None:
        """Measure the head after an epoch, on the first process alone, and log it."""
        if not self._processes.first:
            return
        recipe = self._config.recipe
        figures = validate(
            head,
            self.tiles,
            valid,
            log_scale=log_scale.detach(),
            batch=recipe.validation_batch,
            precision=self.frozen.precision,
        )
        entry: dict[str, float | int] = {
            "level": valid.zoom,
            "epoch": level.epochs_done,
            "step": level.step,
            "valid_loss": figures.loss,
            **{f"recall_{k}": share for k, share in zip(RANKS, figures.recall, strict=True)},
            "pairs": level.pairs,
            "missing_tiles": dropped,
            "seconds": level.seconds,
        }
        self._setting.folder.log(entry)
        lacking = f", {dropped} photos without a tile" if dropped else ""
        self._say(
            f"zoom {valid.zoom}, epoch {level.epochs_done} of {recipe.epochs}: validation loss "
            f"{figures.loss:.3f}, own tile first {figures.recall[0]:.1%}{lacking}"
        )

    def _open_split(self, name: str) -> _Split:
        photos = self._photos[name]
        embeddings = self._photo_features(photos)
        readable = embeddings.prepare()
        unreadable = np.flatnonzero(~readable).tolist()
        lost = ""
        if unreadable:
            listed = self._setting.folder.write_list(
                f"unreadable-{name}", [photos.called(row) for row in unreadable]
            )
            lost = f", {len(unreadable):,} of which cannot be read and are left out: see {listed}"
        self._say(f"{name}: {len(readable):,} photos{lost}")
        if not readable.any():
            raise TrainingError(f"none of the {len(readable)} photos of the split {name} can be read")
        return _Split(photos, embeddings, readable)

    def _photo_features(self, photos: Photos) -> PhotoFeatures:
        cache = self._config.cache
        if cache is None:
            return ComputedPhotos(self.frozen, photos)
        return CachedPhotos(self.frozen, photos, cache, self._processes, self._progress)

    def _needed(self, zoom: int) -> Keys:
        """Return the tiles of a level whose tokens the run needs, distinct and sorted."""
        recipe = self._config.recipe
        train, valid = (own_tiles(zoom, self._photos[name]) for name in ("train", "valid"))
        parts = [needed_tiles(zoom, train, recipe), valid]
        if self._config.sibling_photos:
            # A few more than are scored, since photos may turn out to be unreadable or without a tile.
            parts.append(sibling_keys(valid[: 2 * self._config.sibling_photos]))
        return np.unique(np.concatenate(parts))

    def _check_room(self, zooms: Sequence[int]) -> None:
        """Say how much disk the activations need, and refuse to begin where there is less."""
        if not isinstance(self.tiles, CachedTiles) or self._config.cache is None:
            return
        wanted = sum(self.tiles.missing_bytes(zoom, self._needed(zoom)) for zoom in zooms)
        self._say(f"trunk activations: {wanted / 1e9:.2f} GB to add to {self._config.cache}")
        check_room(self._config.cache, wanted)

    def _identity(self, tiles: str) -> dict[str, Any]:
        """Return what makes this run another one than others; how often it saves does not."""
        config = self._config
        return {
            "start": self.frozen.digest,
            "train": self._photos["train"].identity,
            "valid": self._photos["valid"].identity,
            "tiles": tiles,
            "levels": sorted(config.levels),
            "seed": config.seed,
            "precision": self.frozen.precision,
            "sibling_photos": config.sibling_photos,
            **{f"recipe.{name}": value for name, value in asdict(config.recipe).items()},
        }

    def _write_folder(self, zooms: Sequence[int]) -> None:
        heads, scales = {}, {}
        for zoom in zooms:
            level = self._setting.folder.load(encoder_name(zoom))
            assert level is not None  # trained or loaded above
            tensors, figures = level
            heads[encoder_name(zoom)] = {n: t for n, t in tensors.items() if n != "logit_scale"}
            scales[encoder_name(zoom)] = figures["scale"]
        write_encoders(self._config.out / "encoders", self._start, heads, scales)


def _position(state: tuple[Tensors, dict[str, Any]] | None, done: Sequence[int]) -> tuple[int, int] | None:
    """Return the level and step that the files of a run go up to, None before the first state."""
    if state is not None:
        return state[1]["level"], state[1]["step"]
    return (min(done), 2**62) if done else None
