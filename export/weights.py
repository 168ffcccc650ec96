"""Reading weights without ever running code from them, and fitting them to an architecture."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from geoengine.engine.errors import ExportError

State = Mapping[str, torch.Tensor]


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, or of a `.pt`, `.pth` or `.bin` file of tensors only.

    The contents of a "state_dict" entry are unwrapped, and a common "module." prefix (of data-parallel
    training) is dropped. Raises ExportError for a missing, damaged or unsafe file; nothing is unpickled into
    objects.
    """
    if not file.is_file():
        raise ExportError(f"weights file {file} does not exist")
    loaded = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ExportError(f"{file} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    state = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise ExportError(f"{file} holds no tensors")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _read_safetensors(file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{file} is not a readable safetensors file: {error}") from error


def _read_torch(file: Path) -> object:
    if _is_torchscript(file):
        raise ExportError(
            f"{file} is refused: it is a TorchScript program, as OpenAI's own CLIP files are, and opening it "
            "could run code; take the safetensors file of these weights, or their tag, such as "
            "--pretrained openai"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{file} is refused: it holds more than tensors, and opening it could run code; "
            "save it as safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ExportError(f"{file} is not a readable PyTorch weights file: {error}") from error


def _is_torchscript(file: Path) -> bool:
    """Tell whether a file is a TorchScript archive; a file of weights lacks the record of constants."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def fit(state: State, reference: State, names: Iterable[str], what: str) -> dict[str, torch.Tensor]:
    """Return the float32 tensors `names` of `state`, checked against the shapes in `reference`.

    `what` names the origin in errors. Raises ExportError when one is missing, left over, or of another shape.
    """
    wanted = list(names)
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ExportError(f"{what} lacks {_list(missing)}")
    unknown = sorted(set(state) - set(wanted))
    if unknown:
        raise ExportError(f"{what} has tensors that do not belong to it: {_list(unknown)}")
    for name in wanted:
        if state[name].shape != reference[name].shape:
            raise ExportError(
                f"tensor {name} of {what} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(reference[name].shape)}"
            )
    return {name: state[name].detach().to("cpu", torch.float32).contiguous() for name in wanted}


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
