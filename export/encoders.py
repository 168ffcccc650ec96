"""Sets of encoders: a photo encoder and one map encoder per level, all of one vision architecture.

A folder of encoders that share a trunk holds float16 tensors under open_clip's `VisionTransformer` names:

```
encoders.json               model, world, sizes (`vision`), mean, std, trunk_layers, levels, logit_scale
trunk.safetensors           patch embedding and the first `trunk_layers` blocks
head_<encoder>.safetensors  the other blocks, ln_post and proj; `<encoder>` is "photo", "z04", "z06" ...
```
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import PHOTO, encoder_name
from geoengine.export.towers import TowerParts, tower_parts
from geoengine.export.weights import State, fit, read_state

if TYPE_CHECKING:
    from geoengine.export.model import Head, Trunk

DEFAULT_LOGIT_SCALE = 100.0  # CLIP's own, trained up to its bound
_FOLDER_CONFIG = "encoders.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """Sizes of an open_clip `VisionTransformer` that pools its class token; image and patch in pixels."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    output_dim: int = 512
    quick_gelu: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "layers", "heads", "output_dim"):
            if getattr(self, name) < 1:
                raise ExportError(f"vision {name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size or self.width % self.heads:
            raise ExportError(
                f"image size {self.image_size} must be a multiple of patch size {self.patch_size}, "
                f"and width {self.width} of heads {self.heads}"
            )

    def build(self) -> nn.Module:
        """Make an open_clip `VisionTransformer` of these sizes: random float32 weights, eval mode."""
        from open_clip.transformer import QuickGELU, VisionTransformer  # type: ignore[import-untyped]

        tower: nn.Module = VisionTransformer(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            output_dim=self.output_dim,
            act_layer=QuickGELU if self.quick_gelu else nn.GELU,
        )
        return tower.eval()

    def build_from(self, state: State) -> nn.Module:
        """Make a tower whose parameters are the given tensors themselves, so that towers can share them."""
        with torch.device("meta"):  # allocates nothing, and draws no random numbers
            tower = self.build()
        tower.load_state_dict(state, assign=True)
        return tower.requires_grad_(False)

    def reference(self) -> State:
        """Return the state dict of such a tower with shapes only (tensors on the meta device)."""
        with torch.device("meta"):
            return self.build().state_dict()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncoderSet:
    """The photo encoder and the map encoders that a bundle is made of.

    `towers` holds one complete float32 vision tower per encoder, keyed "photo" and "z04" to "z16".
    `trunk_layers` is the number of leading transformer blocks that they share. `logit_scale` multiplies a
    map encoder's cosines before a softmax. `mean` and `std` are per RGB channel, of pixels in 0 to 1, and
    `resize_mode` says how a photo becomes a square: "shortest" scales its shorter side and keeps the middle,
    "squash" scales both sides. `trunk_layers` is None when not even what comes before the blocks is shared.
    `pretrained` is "none" when the weights are random.
    """

    model: str
    pretrained: str
    world: str
    towers: Mapping[str, nn.Module]
    trunk_layers: int | None
    levels: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_mode: str = "shortest"
    logit_scale: Mapping[str, float]

    def __post_init__(self) -> None:
        expected = [PHOTO, *map(encoder_name, self.levels)]
        if list(self.towers) != expected:
            raise ExportError(f"encoders must be {', '.join(expected)}; got {', '.join(self.towers)}")
        missing = [name for name in expected[1:] if name not in self.logit_scale]
        if missing:
            raise ExportError(f"no logit scale for {', '.join(missing)}")

    @property
    def image_size(self) -> int:
        """The side in pixels of the square pictures that the towers take."""
        return self._parts.image_size

    @property
    def embed_dim(self) -> int:
        """The length of an embedding."""
        return self._parts.embed_dim

    def trunk(self, side: int) -> Trunk:
        """Return the trunk that the encoders share, for pictures of `side` pixels."""
        from geoengine.export.model import Trunk

        return Trunk(self.towers[PHOTO], blocks=self.trunk_layers, side=side, mean=self.mean, std=self.std)

    def head(self, name: str) -> Head:
        """Return the head of an encoder."""
        from geoengine.export.model import Head

        return Head(self.towers[name], trunk_layers=self.trunk_layers, mean=self.mean, std=self.std)

    @property
    def _parts(self) -> TowerParts:
        return tower_parts(self.towers[PHOTO])


# How state-dict names begin in open_clip's own vision transformers, and in timm's within them.
_BLOCKS = ("transformer.resblocks.", "trunk.blocks.")
_AFTER_BLOCKS = (
    "ln_post.",
    "proj",
    "trunk.norm.",
    "trunk.attn_pool.",
    "trunk.fc_norm.",
    "trunk.head.",
    "head.",
)


def block_of(name: str) -> int | None:
    """Return the number of the transformer block that a state-dict name belongs to, None outside them."""
    for start in _BLOCKS:
        if name.startswith(start):
            return int(name.removeprefix(start).split(".")[0])
    return None


def in_trunk(name: str, trunk_layers: int | None) -> bool:
    """Tell whether a tower's state-dict name is in its stem or its first `trunk_layers` blocks."""
    block = block_of(name)
    if trunk_layers is None:
        return False
    return not name.startswith(_AFTER_BLOCKS) if block is None else block < trunk_layers


def state_digest(state: State) -> str:
    """Return the SHA-256, as hex, of a state dict's names, shapes and float32 values, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def shared_blocks(states: Mapping[str, State], limit: int) -> int | None:
    """Count the leading blocks, at most `limit`, whose tensors have the same SHA-256 in every encoder.

    None when what comes before the blocks, the patch embedding, already differs.
    """
    if not _all_equal([_block(state, None) for state in states.values()]):
        return None
    for block in range(limit):
        if not _all_equal([_block(state, block) for state in states.values()]):
            return block
    return limit


def _all_equal(states: Sequence[State]) -> bool:
    """Tell whether states have one digest; tensors that are in several of them are read once."""
    distinct = {tuple((name, state[name].data_ptr()) for name in sorted(state)): state for state in states}
    return len(set(map(state_digest, distinct.values()))) == 1


def _block(state: State, block: int | None) -> State:
    """Return the tensors of one block, or (None) those before the first."""
    if block is None:
        return {name: tensor for name, tensor in state.items() if in_trunk(name, 0)}
    return {name: tensor for name, tensor in state.items() if block_of(name) == block}


def save_encoder_folder(
    path: str | os.PathLike[str],
    *,
    vision: VisionConfig,
    trunk: State,
    heads: Mapping[str, State],
    trunk_layers: int,
    mean: Sequence[float],
    std: Sequence[float],
    logit_scale: Mapping[str, float],
    model: str = "planet-vit",
    world: str = "planet",
) -> None:
    """Write encoders that share a trunk to a folder: `encoders.json`, and safetensors files in float16.

    `trunk` is a vision tower's state dict, of which the stem and the first `trunk_layers` blocks are used.
    `heads` has one state dict per encoder, keyed "photo" and "z04" to "z16"; trunk tensors may be left out
    of them, and where present must equal those of `trunk`. `logit_scale` (not its logarithm) has one number
    per map encoder. Values are rounded to float16. An existing folder of encoders is replaced only when
    everything has been written. Raises ExportError for missing, unequal, wrongly shaped or non-finite
    tensors, and for a path that holds something else.
    """
    target = Path(path)
    if target.exists() and not (target / _FOLDER_CONFIG).exists() and any(target.iterdir()):
        raise ExportError(f"{target} exists and is not a folder of encoders; name another folder")
    levels = sorted(int(name[1:]) for name in heads if name != PHOTO)
    names = [PHOTO, *map(encoder_name, levels)]
    if set(names) != set(heads) or not levels:
        raise ExportError(f"heads must be named photo and z04 to z16, got {', '.join(sorted(heads))}")
    reference = vision.reference()
    trunk_names = [name for name in reference if in_trunk(name, trunk_layers)]
    head_names = [name for name in reference if not in_trunk(name, trunk_layers)]
    own = {name: tensor for name, tensor in trunk.items() if in_trunk(name, trunk_layers)}
    files = {"trunk.safetensors": fit(own, reference, trunk_names, "the trunk")}
    for name in names:
        repeated = {key: tensor for key, tensor in heads[name].items() if in_trunk(key, trunk_layers)}
        if state_digest(repeated) != state_digest({key: own[key] for key in repeated if key in own}):
            raise ExportError(f"the trunk tensors given with {name} differ from the trunk")
        rest = {key: tensor for key, tensor in heads[name].items() if key not in repeated}
        files[f"head_{name}.safetensors"] = fit(rest, reference, head_names, name)
    config = {
        "model": model,
        "world": world,
        "vision": asdict(vision),
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "trunk_layers": trunk_layers,
        "levels": levels,
        "logit_scale": {name: float(logit_scale[name]) for name in names[1:]},
    }
    _write_folder(target, files, config)


def _write_folder(target: Path, files: Mapping[str, State], config: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, state in files.items():
            save_file({key: _to_half(tensor, key) for key, tensor in state.items()}, staging / name)
        (staging / _FOLDER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(staging: Path, target: Path) -> None:
    """Move the finished folder `staging` to `target`, in the same parent; what was there goes only then."""
    staging.chmod(0o755)  # temporary folders are private
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed below
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _to_half(tensor: torch.Tensor, name: str) -> torch.Tensor:
    half = tensor.detach().to("cpu", torch.float16).contiguous().clone()
    if not bool(torch.isfinite(half).all()):
        raise ExportError(f"tensor {name} has values that float16 cannot hold")
    return half


def load_encoder_folder(path: str | os.PathLike[str], *, levels: tuple[int, ...] | None = None) -> EncoderSet:
    """Load what `save_encoder_folder` wrote, as float32 towers that share the trunk's tensors.

    `levels` chooses some of the folder's levels. Raises ExportError for a missing or damaged
    file, and for tensors whose shapes do not fit.
    """
    folder = Path(path)
    config = _read_config(folder)
    vision: VisionConfig = config.pop("vision")
    trunk_layers, reference = config["trunk_layers"], vision.reference()
    if not 0 <= trunk_layers < vision.layers:
        raise ExportError(f"{folder}: trunk_layers must be in [0, {vision.layers}), got {trunk_layers}")
    config["levels"] = config["levels"] if levels is None else levels
    names = [PHOTO, *map(encoder_name, config["levels"])]
    missing = [name for name in names if not (folder / f"head_{name}.safetensors").is_file()]
    if missing:
        raise ExportError(f"{folder} has no head for {', '.join(missing)}")
    trunk_file = folder / "trunk.safetensors"
    trunk_names = [name for name in reference if in_trunk(name, trunk_layers)]
    head_names = [name for name in reference if not in_trunk(name, trunk_layers)]
    trunk = fit(read_state(trunk_file), reference, trunk_names, str(trunk_file))
    towers = {}
    for name in names:
        file = folder / f"head_{name}.safetensors"
        towers[name] = vision.build_from(trunk | fit(read_state(file), reference, head_names, str(file)))
    return EncoderSet(pretrained="checkpoints", towers=towers, **config)


def folder_vision(path: str | os.PathLike[str]) -> VisionConfig:
    """Return the sizes of the towers in a folder that `save_encoder_folder` wrote; raises ExportError."""
    vision: VisionConfig = _read_config(Path(path))["vision"]
    return vision


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / _FOLDER_CONFIG
    if not file.is_file():
        raise ExportError(f"{folder} is not a folder of encoders: it has no {_FOLDER_CONFIG}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        sizes = {field.name: raw["vision"][field.name] for field in fields(VisionConfig)}
        return {
            "model": str(raw["model"]),
            "world": str(raw["world"]),
            "vision": VisionConfig(**sizes),
            "levels": tuple(int(level) for level in raw["levels"]),
            "trunk_layers": int(raw["trunk_layers"]),
            "mean": _per_channel(raw["mean"]),
            "std": _per_channel(raw["std"]),
            "logit_scale": {str(key): float(value) for key, value in raw["logit_scale"].items()},
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{file} is damaged: {error!r}") from error


def _per_channel(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
