"""Training of one level: its steps, its schedule, and going on where a killed process stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from geoengine.engine.readahead import ReadAhead
from geoengine.training.contrastive import (
    Batch,
    bound_scale,
    compute_gradients,
    fit_projection,
    smoothed_target,
)
from geoengine.training.errors import TrainingError
from geoengine.training.features import PhotoFeatures, TileFeatures
from geoengine.training.levels import Int64Array, LevelPairs
from geoengine.training.photos import Photos
from geoengine.training.processes import Processes, autocast
from geoengine.training.recipe import Recipe, Schedule
from geoengine.training.state import RunFolder, Tensors
from geoengine.training.towers import Head

STATE = "state"
_WARM_UP = 0.05  # of the steps, of the cosine schedule
_FITTED_PAIRS = 20_000  # that the projection is fitted on, at most
_ENCODED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Setting:
    """What all levels of a run have in common."""

    recipe: Recipe
    seed: int
    precision: str
    save_every: int
    log_every: int
    processes: Processes
    tiles: TileFeatures
    folder: RunFolder


class LevelTraining:
    """Trains `head` and `log_scale` in place on the pairs of a level.

    Data order and negatives are a function of seed, zoom, epoch and step, so a state is the weights, the
    optimizer's numbers and the step.
    """

    def __init__(
        self,
        setting: Setting,
        pairs: LevelPairs,
        photos: Photos,
        embeddings: PhotoFeatures,
        head: Head,
        log_scale: nn.Parameter,
    ) -> None:
        self._setting, self._pairs, self._photos, self._embeddings = setting, pairs, photos, embeddings
        self._head, self._log_scale = head, log_scale
        recipe = setting.recipe
        own = [parameter for parameter in head.parameters() if parameter is not head.proj]
        fast = [head.proj, log_scale]
        # Adam, as in the paper, where the weights do not decay.
        self._optimizer = torch.optim.AdamW(
            [
                {"params": own, "weight_decay": recipe.weight_decay, "rate": 1.0},
                {"params": fast, "weight_decay": 0.0, "rate": recipe.projection_rate},
            ],
            lr=recipe.learning_rate,
        )
        # A last batch of one photo would have nothing to be told apart from.
        self.steps_per_epoch = max(1, len(pairs) // recipe.batch + (len(pairs) % recipe.batch > 1))
        self.step, self._losses, self._counted = 0, 0.0, 0
        self._started = time.perf_counter()

    @property
    def pairs(self) -> int:
        """Photos that the level is trained on."""
        return len(self._pairs)

    @property
    def epochs_done(self) -> int:
        """Whole epochs that have been trained."""
        return self.step // self.steps_per_epoch

    @property
    def seconds(self) -> float:
        """Seconds since this process began with the level."""
        return time.perf_counter() - self._started

    def start(self) -> None:
        """Begin a level: every process with the same weights, and the projection in closed form if wanted."""
        setting = self._setting
        if setting.recipe.ridge:
            chosen = np.arange(len(self._pairs))
            if len(chosen) > _FITTED_PAIRS:
                chosen = np.sort(self._rng(0).choice(chosen, _FITTED_PAIRS, replace=False))
            tiles, row = np.unique(self._pairs.own[chosen], return_inverse=True)
            with torch.no_grad(), autocast(setting.processes.device, setting.precision):
                features = torch.cat(
                    [
                        self._head.features(
                            setting.tiles.tokens(
                                self._pairs.zoom, tiles[start : start + _ENCODED_AT_ONCE]
                            ).float()
                        ).float()
                        for start in range(0, len(tiles), _ENCODED_AT_ONCE)
                    ]
                )
            rows = torch.from_numpy(row.reshape(-1)).to(features.device)
            photos = self._embeddings.embeddings(self._pairs.rows[chosen])
            with torch.no_grad():
                self._head.proj.copy_(fit_projection(features[rows], photos, setting.recipe.ridge))
        setting.processes.broadcast([*self._head.parameters(), self._log_scale])

    def resume(self, tensors: Tensors, figures: dict[str, Any]) -> None:
        """Go on from a state that `save` wrote."""
        groups: dict[str, Tensors] = {"head": {}, "optimizer": {}, "scale": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            groups.setdefault(kind, {})[rest] = tensor
        self._head.load_tower_state(groups["head"])
        self._log_scale.data.copy_(groups["scale"]["log"])
        moments: dict[int, Tensors] = {}
        for name, tensor in groups["optimizer"].items():
            number, _, key = name.partition("/")
            moments.setdefault(int(number), {})[key] = tensor
        known = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": moments, "param_groups": known["param_groups"]})
        self.step, self._losses, self._counted = figures["step"], figures["losses"], figures["counted"]

    def save(self) -> None:
        """Write the state, in place of the one before."""
        tensors = {f"head/{name}": tensor for name, tensor in self._head.tower_state().items()}
        tensors["scale/log"] = self._log_scale
        for number, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{key}": tensor for key, tensor in moments.items()}
        figures = {
            "level": self._pairs.zoom,
            "step": self.step,
            "losses": self._losses,
            "counted": self._counted,
        }
        self._setting.folder.save(STATE, tensors, figures)

    def run_epoch(self) -> None:
        """Train to the end of the epoch; raises TrainingError when the loss or a gradient is not finite."""
        setting, epoch = self._setting, self.epochs_done
        with ReadAhead(lambda: self._batches(epoch, self.step % self.steps_per_epoch), depth=1) as ahead:
            while True:
                try:
                    batch = ahead.take()
                except StopIteration:
                    break
                self._learn(batch)
                if self.step % setting.log_every == 0:
                    self._log(epoch)
                if self.step % setting.save_every == 0 and self.step % self.steps_per_epoch:
                    self.save()

    def _learn(self, batch: Batch) -> None:
        setting, recipe = self._setting, self._setting.recipe
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * self._learning_rate()
        loss = compute_gradients(
            self._head, self._log_scale, batch, setting.processes, recipe.accumulate, setting.precision
        )
        gradients = [p.grad for p in (*self._head.parameters(), self._log_scale) if p.grad is not None]
        if not math.isfinite(loss) or not bool(torch.isfinite(nn.utils.get_total_norm(gradients))):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise TrainingError(
                f"zoom {self._pairs.zoom}: the {what} is no longer a number at step {self.step + 1} (epoch "
                f"{self.epochs_done + 1}); {setting.folder.path} keeps the last good state. Train again in "
                "another folder with a smaller --lr, or with --precision fp32"
            )
        self._optimizer.step()
        bound_scale(self._log_scale)
        self.step += 1
        self._losses += loss
        self._counted += 1

    def _learning_rate(self) -> float:
        recipe = self._setting.recipe
        if recipe.schedule is Schedule.constant:
            return recipe.learning_rate
        steps = self.steps_per_epoch * recipe.epochs
        rise = max(1, round(_WARM_UP * steps))
        if self.step < rise:
            return recipe.learning_rate * (self.step + 1) / rise
        return (
            recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.step - rise) / max(1, steps - rise)))
        )

    def _log(self, epoch: int) -> None:
        self._setting.folder.log(
            {
                "level": self._pairs.zoom,
                "epoch": epoch + 1,
                "step": self.step,
                "loss": self._losses / self._counted,
                "scale": math.exp(float(self._log_scale.detach())),
                "learning_rate": float(self._optimizer.param_groups[0]["lr"]),
                "seconds": self.seconds,
            }
        )
        self._losses, self._counted = 0.0, 0

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        order = self._rng(epoch + 1).permutation(len(self._pairs))
        for number in range(first, self.steps_per_epoch):
            start = number * self._setting.recipe.batch
            yield self._batch(epoch, order[start : start + self._setting.recipe.batch])

    def _batch(self, epoch: int, chosen: Int64Array) -> Batch:
        """Put a step's photos and tiles together; this process's share of the tokens is read at once."""
        setting, pairs = self._setting, self._pairs
        rows, own = pairs.rows[chosen], pairs.own[chosen]
        negatives = pairs.negatives(chosen, setting.recipe, epoch)
        tiles, column = np.unique(np.concatenate([own, negatives]), return_inverse=True)
        place = column.reshape(-1)[: len(own)]
        target = torch.from_numpy(place)
        if setting.recipe.smoothing:
            places = self._photos.lng[rows], self._photos.lat[rows]
            target = torch.from_numpy(
                smoothed_target(pairs.zoom, places, tiles, place, setting.recipe.smoothing)
            )
        share = setting.processes.share(len(tiles))
        tokens = setting.tiles.tokens(pairs.zoom, tiles[share])
        return Batch(
            photos=self._embeddings.embeddings(rows),
            target=target.to(setting.processes.device),
            tiles=len(tiles),
            tokens=lambda part: tokens[part.start - share.start : part.stop - share.start],
        )

    def _rng(self, use: int) -> np.random.Generator:
        return np.random.default_rng([self._setting.seed, self._pairs.zoom, use])
