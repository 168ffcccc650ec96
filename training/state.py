"""The files of a training run: what it is, how far it has come, and its log.

```
run.json             settings and what the run is of; another run is refused in the same folder
z16.safetensors      a level that is done: its trained layers in float32, for `build-engines --checkpoints`
state.safetensors    the level in work: weights, optimizer, position
log.csv              figures of steps and validations
```
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from geoengine.training.errors import TrainingError
from geoengine.training.rows import disk_error

Tensors = dict[str, torch.Tensor]
Entry = Mapping[str, float | int | str]

COLUMNS = (
    "level", "epoch", "step", "loss", "scale", "learning_rate", "valid_loss", "recall_1", "recall_5",
    "recall_10", "sibling_recall", "pairs", "missing_tiles", "seconds",
)  # fmt: skip


class RunFolder:
    """The folder of a run; several processes may have it open, and the first one writes."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, writes: bool) -> None:
        self.path, self._writes = path, writes
        file = path / "run.json"
        wanted = json.loads(json.dumps(identity))
        if file.exists():
            _check_identity(file, wanted)
        elif writes:
            # A hidden file may be what a process was writing when it was killed.
            if path.exists() and any(not file.name.startswith(".") for file in path.iterdir()):
                raise TrainingError(f"{path} exists and holds something else: name another folder with --out")
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise disk_error(path, error) from None
            _write(file, (json.dumps(wanted, indent=2) + "\n").encode())

    def load(self, name: str) -> tuple[Tensors, dict[str, Any]] | None:
        """Return the tensors and figures of `<name>.safetensors`, None when there is no such file."""
        file = self.path / f"{name}.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                figures = json.loads((opened.metadata() or {}).get("figures", "null"))
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise TrainingError(f"{file} is damaged ({error}): delete it to train from before it") from error
        if not isinstance(figures, dict):
            raise TrainingError(f"{file} was not written by geoengine train: name another folder with --out")
        return tensors, figures

    def save(self, name: str, tensors: Tensors, figures: Mapping[str, Any]) -> None:
        """Write `<name>.safetensors` whole, or leave it as it was; raises TrainingError when it cannot."""
        if self._writes:
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            _write(
                self.path / f"{name}.safetensors",
                save(contiguous, metadata={"format": "pt", "figures": json.dumps(figures)}),
            )

    def remove(self, name: str) -> None:
        """Delete `<name>.safetensors`, if it is there."""
        if self._writes:
            (self.path / f"{name}.safetensors").unlink(missing_ok=True)

    def rewind_log(self, position: tuple[int, int] | None) -> None:
        """Drop what the log says after a position (level, step), None for all of it, and start it if need be.

        Levels are trained from fine to coarse.
        """
        if not self._writes:
            return
        file = self.path / "log.csv"
        rows = []
        if file.exists() and position is not None:
            with file.open(newline="", encoding="utf-8") as lines:
                rows = [row for row in csv.DictReader(lines) if _before(row, position)]
        temporary = file.with_suffix(".tmp")
        try:
            with temporary.open("w", newline="", encoding="utf-8") as lines:
                writer = csv.DictWriter(lines, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            temporary.replace(file)
        except OSError as error:
            raise disk_error(file, error) from None

    def write_list(self, name: str, lines: Sequence[str]) -> Path:
        """Write `<name>.txt`, one line each; returns its path."""
        file = self.path / f"{name}.txt"
        if self._writes:
            _write(file, "".join(f"{line}\n" for line in lines).encode())
        return file

    def log(self, entry: Entry) -> None:
        """Add a line to the log; numbers keep six significant digits."""
        if not self._writes:
            return
        short = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in entry.items()}
        try:
            with (self.path / "log.csv").open("a", newline="", encoding="utf-8") as lines:
                csv.DictWriter(lines, COLUMNS).writerow(short)
        except OSError as error:
            raise disk_error(self.path / "log.csv", error) from None


def _before(row: Mapping[str, str | None], position: tuple[int, int]) -> bool:
    """Tell whether a line of the log is from a position or earlier; a line cut short is not."""
    level, step = row.get("level") or "", row.get("step") or ""
    if not level.isdigit() or not step.isdigit() or row.get("seconds") is None:
        return False
    return (-int(level), int(step)) <= (-position[0], position[1])


def _check_identity(file: Path, wanted: Mapping[str, Any]) -> None:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{file} cannot be read ({error}): name another folder with --out") from None
    differences = [
        f"{name} was {known.get(name)} and is now {value}"
        for name, value in wanted.items()
        if known.get(name) != value
    ]
    if differences:
        raise TrainingError(
            f"{file.parent} holds another run: {'; '.join(differences[:3])}. "
            "Give the options of that run to go on with it, or name another folder with --out"
        )


def _write(file: Path, data: bytes) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(file, error) from None
