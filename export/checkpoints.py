"""CLIP's photo encoder and the map encoders fine-tuned from it, as one set of encoders."""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip  # type: ignore[import-untyped]
import torch
from torch import nn

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import PHOTO, RESIZE_MODES, encoder_name
from geoengine.export.encoders import DEFAULT_LOGIT_SCALE, EncoderSet, block_of, in_trunk, shared_blocks
from geoengine.export.towers import tower_parts
from geoengine.export.weights import State, fit, read_state

RANDOM = "none"
"""The `pretrained` of encoders with random weights."""

HEAD_LAYERS = 2
"""Blocks that a head has at least; fine-tuning changes so many."""


def load_clip_encoders(
    *, model: str, pretrained: str, checkpoints: Path | None = None, levels: Sequence[int]
) -> EncoderSet:
    """Load an open_clip model as photo encoder, and a map encoder per level.

    `pretrained` is an open_clip tag, a file of weights, or "none" for random weights (seeded, for timing
    only). `checkpoints` is a folder with the map encoders, `z04.safetensors` and so on (or `.pt`), and
    perhaps `photo.safetensors`; each holds a whole vision tower, or its last blocks and all that follows
    them, and takes the rest from the pretrained model. Without it, the map encoders are the pretrained model
    itself. Raises ExportError for an unknown model or tag, missing files, and shapes that do not fit.
    """
    _check_names(model, pretrained)
    names = [PHOTO, *map(encoder_name, levels)]
    files = {} if checkpoints is None else _checkpoint_files(checkpoints, names)
    tower = _architecture(model, pretrained)
    reference = tower.state_dict()
    own, scales = {}, {}
    for name, file in files.items():
        own[name], scales[name] = _read_tower(file, reference)
    states: dict[str, State]
    if all(len(own.get(name, ())) == len(reference) for name in names):
        states, scale = dict(own), None
    else:
        base, scale = _pretrained_state(model, pretrained, reference, bool(files))
        states = {name: {**base, **own.get(name, {})} for name in names}
        if pretrained == RANDOM:
            states = {name: _random_head(base, seed) for seed, name in enumerate(names)}
    layers, preprocessing = len(tower_parts(tower).blocks), tower.preprocess_cfg
    return EncoderSet(
        model=model,
        pretrained="checkpoints" if files or _is_file(pretrained) else pretrained,
        world="earth",
        towers={name: _with_weights(tower, states[name]) for name in names},
        trunk_layers=shared_blocks(states, max(layers - HEAD_LAYERS, 0)),
        levels=tuple(levels),
        mean=tuple(preprocessing["mean"]),
        std=tuple(preprocessing["std"]),
        resize_mode=preprocessing["resize_mode"],
        logit_scale={name: scales.get(name) or scale or DEFAULT_LOGIT_SCALE for name in names[1:]},
    )


def _check_names(model: str, pretrained: str) -> None:
    """Raise ExportError, offering the closest names, for an unknown model or tag."""
    known = open_clip.list_models()
    if model not in known:
        raise ExportError(f"unknown model {model!r}{_closest(model, known)}")
    if pretrained == RANDOM or _is_file(pretrained):
        return
    if pretrained.endswith((".safetensors", ".pt", ".pth", ".bin")):
        raise ExportError(f"weights file {pretrained} does not exist")
    if not open_clip.get_pretrained_cfg(model, pretrained):
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ExportError(
            f"model {model} has no pretrained weights {pretrained!r}{_closest(pretrained, tags)}"
        )


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)[:3]
    return f": did you mean {' or '.join(close)}?" if close else ""


def _is_file(pretrained: str) -> bool:
    return Path(pretrained).is_file()


def _checkpoint_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the weight file of every encoder that has one; every map encoder must."""
    if not folder.is_dir():
        raise ExportError(f"checkpoint folder {folder} does not exist")
    files: dict[str, Path] = {}
    for name in names:
        for suffix in (".safetensors", ".pt"):
            if (folder / f"{name}{suffix}").is_file():
                files.setdefault(name, folder / f"{name}{suffix}")
    missing = [name for name in names if name not in files and name != PHOTO]
    if missing:
        raise ExportError(
            f"{folder} lacks the map encoders {', '.join(missing)}: it needs one file per level, "
            f"such as {missing[0]}.safetensors"
        )
    return files


_PREPROCESSING = {"interpolation": ("bicubic",), "resize_mode": RESIZE_MODES}
"""The choices of preprocessing that a bundle can have."""


def _architecture(model: str, pretrained: str) -> Any:  # noqa: ANN401  # open_clip is untyped
    """Return the vision tower on the meta device; its `preprocess_cfg` is that of the pretrained weights."""
    tower = _make_tower(model, pretrained, "meta")  # large models take minutes to fill with random numbers
    tower_parts(tower)
    for key, known in _PREPROCESSING.items():
        if tower.preprocess_cfg[key] not in known:
            raise ExportError(
                f"{model} with {pretrained!r} was trained with {key} {tower.preprocess_cfg[key]!r}; "
                f"only {' and '.join(map(repr, known))} can be exported"
            )
    return tower


def _make_tower(model: str, pretrained: str, device: str) -> Any:  # noqa: ANN401  # open_clip is untyped
    """Return a vision tower with random weights, the same every time."""
    config = {} if pretrained == RANDOM else open_clip.get_pretrained_cfg(model, pretrained)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device), _quiet():
            torch.manual_seed(0)
            clip = open_clip.create_model(
                model,
                pretrained=None,
                precision="fp32",
                device=device,
                # OpenAI's weights need QuickGELU whatever the model is called
                force_quick_gelu=bool(config.get("quick_gelu", False)),
                force_preprocess_cfg=_preprocessing(model, pretrained),
            )
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        raise ExportError(f"open_clip cannot make the model {model}: {error}") from error
    return clip.visual.eval().requires_grad_(False)


def _preprocessing(model: str, pretrained: str) -> dict[str, Any]:
    """Return what a tag says of its preprocessing; for other weights, what all the model's tags agree on."""
    known = open_clip.list_pretrained_tags_by_model(model)
    tags = [pretrained] if pretrained in known else known
    configs = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    keys = ("mean", "std", *_PREPROCESSING)
    return {
        key: config[key]
        for config in configs[:1]
        for key in keys
        if key in config and all(other.get(key) == config[key] for other in configs)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip from warning, through the root logger, that weights are random so far."""
    disabled = logging.root.manager.disable
    handler = logging.NullHandler()  # without any handler, logging would install one for good
    logging.root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        logging.root.removeHandler(handler)


def _pretrained_state(
    model: str, pretrained: str, reference: State, partial: bool
) -> tuple[State, float | None]:
    """Return a whole tower's weights, and the logit scale where they come with one."""
    if pretrained == RANDOM:
        if partial:
            raise ExportError(
                "the checkpoints hold only part of an encoder, and the rest cannot be random: "
                "name the weights that they were fine-tuned from with --pretrained"
            )
        return _make_tower(model, pretrained, "cpu").state_dict(), None
    file = Path(pretrained)
    if not file.is_file():
        file = _download(model, pretrained)
    state, scale = _split_clip(read_state(file))
    return fit(state, reference, reference, str(file)), scale


def _download(model: str, tag: str) -> Path:
    """Return the file of a pretrained tag, from open_clip's cache or the network."""
    config = open_clip.get_pretrained_cfg(model, tag)
    try:
        with _quiet():
            return Path(open_clip.download_pretrained(config))
    except Exception as error:  # each download library raises its own
        hub, url = str(config.get("hf_hub", "")).rstrip("/"), config.get("url", "")
        names = "open_clip_model.safetensors (or open_clip_pytorch_model.bin)"
        where = f"{names} of huggingface.co/{hub}" if hub else url
        raise ExportError(
            f"the weights {tag!r} of {model} cannot be downloaded ({type(error).__name__}): download {where} "
            "on another machine, copy it here, and pass the file as --pretrained"
        ) from error


def _read_tower(file: Path, reference: State) -> tuple[dict[str, torch.Tensor], float | None]:
    """Read a whole tower or its last part, checked, and the logit scale if there is one."""
    state, scale = _split_clip(read_state(file))
    expected = list(reference)
    if not any(name in state for name in reference if in_trunk(name, 0)):
        blocks = [block for block in map(block_of, state) if block is not None]
        first = min(blocks, default=len(reference))
        expected = [name for name in reference if not in_trunk(name, first)]
    return fit(state, reference, expected, str(file)), scale


def _split_clip(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float | None]:
    """Return the vision tower's tensors of a checkpoint, and its logit scale (CLIP stores the logarithm)."""
    scale = state.get("logit_scale")
    tower = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    if not tower:
        tower = {name: tensor for name, tensor in state.items() if name != "logit_scale"}
    return tower, None if scale is None else math.exp(float(scale))


def _random_head(base: State, seed: int) -> State:
    """Return `base` with other random matrices in its last blocks and projection."""
    generator = torch.Generator().manual_seed(seed)
    last = max(block for block in map(block_of, base) if block is not None)
    state = dict(base)
    for name, tensor in base.items():
        if tensor.ndim > 1 and not in_trunk(name, last + 1 - HEAD_LAYERS):
            state[name] = torch.randn(tensor.shape, generator=generator) * tensor.std()
    return state


def _with_weights(tower: nn.Module, state: State) -> nn.Module:
    """Return a tower like `tower` whose parameters are the given tensors themselves, not copies."""
    like = copy.deepcopy(tower)
    like.load_state_dict(state, assign=True)
    return like.requires_grad_(False)
