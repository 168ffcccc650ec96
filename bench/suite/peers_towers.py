"""What encoders are compared on: a tower with random weights, one with outlier channels, and pictures.

Random weights lack the outlier channels of trained towers, which spoil careless int8: hence the second tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.suite.workload import MODEL, drawn_photos, drawn_places
from geoengine.engine.manifest import PHOTO
from geoengine.engine.preprocess import to_square
from geoengine.engine.sources import planet
from geoengine.engine.tiles import LEVELS, tile_at

SIDE = 224
TRUNK_BLOCKS = 10
OUTLIERS = {87: 20.0, 133: -30.0, 363: 45.0, 481: -60.0, 691: 80.0, 715: -100.0}
"""Residual channels that a tower with outliers has, and how many times as large as the rest they become."""

_TILE_SEED, _PHOTO_SEED = 3, 4  # others than those of the pictures that int8 is calibrated on


@dataclass(frozen=True)
class Tower:
    """An open_clip vision tower, how its pictures are made, and a folder for files made of it.

    `side` is that of the pictures, `trunk_blocks` how many blocks our graphs' trunk has.
    """

    module: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folder: Path
    side: int = SIDE
    trunk_blocks: int = TRUNK_BLOCKS

    def normalised(self, pixels: NDArray[np.uint8], device: str = "cpu") -> Any:  # noqa: ANN401 - a tensor
        """Return pictures as a tower takes them: a float32 tensor [n, 3, side, side]."""
        import torch

        centre = torch.tensor(self.mean, device=device)[:, None, None]
        spread = torch.tensor(self.std, device=device)[:, None, None]
        return (torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 255 - centre) / spread

    @cached_property
    def stock_onnx(self) -> Path:
        """The whole tower as PyTorch's own exporter writes it, `model.onnx`, for any number of pictures."""
        import torch

        path = self.folder / "stock" / "model.onnx"
        path.parent.mkdir()
        torch.onnx.export(
            self.module,
            (torch.zeros(2, 3, self.side, self.side),),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            input_names=["pixel_values"],
            output_names=["image_embeds"],
            external_data=False,
            verbose=False,
        )
        return path


def random_tower(folder: Path, *, outliers: bool) -> Tower:
    """Return ViT-B/32 with seeded random weights, and with outlier channels if asked."""
    import torch

    from geoengine.export.checkpoints import load_clip_encoders

    torch.manual_seed(0)
    encoders = load_clip_encoders(model=MODEL, pretrained="none", levels=(4,))
    module = encoders.towers[PHOTO].requires_grad_(False)
    if outliers:
        with torch.no_grad():
            _add_outliers(module)
    return Tower(module, tuple(encoders.mean), tuple(encoders.std), folder)


def drawn_tiles(count: int) -> NDArray[np.uint8]:
    """Return tiles of the planet's land at all levels, uint8[count, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(_TILE_SEED)
    tiles = []
    for place in drawn_places(count, _TILE_SEED):
        at = tile_at(place, int(rng.choice(LEVELS)))
        tiles.append(planet.tile(at.z, at.x, at.y, size=SIDE))
    return np.stack(tiles)


def drawn_squares(count: int) -> NDArray[np.uint8]:
    """Return photos of the planet's land, as encoders take them: uint8[count, SIDE, SIDE, 3]."""
    return np.stack([to_square(photo, SIDE) for photo in drawn_photos(count, _PHOTO_SEED, SIDE)])


def _add_outliers(module: Any) -> None:  # noqa: ANN401 - open_clip is untyped
    """Give a tower outlier channels: the same ones for all tokens, of one sign, growing from the first block.

    As described in LLM.int8 (Dettmers et al., 2022) and SmoothQuant (Xiao et al., 2023).
    """
    import torch

    blocks = module.transformer.resblocks
    generator = torch.Generator().manual_seed(7)
    for block in blocks:
        for norm in (block.ln_1, block.ln_2):
            norm.weight += 0.15 * torch.randn(norm.weight.shape, generator=generator)
            norm.bias += 0.1 * torch.randn(norm.bias.shape, generator=generator)
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.bias += 0.05 * torch.randn(layer.bias.shape, generator=generator)
    for channel, size in OUTLIERS.items():
        module.class_embedding[channel] += 0.1 * size
        module.positional_embedding[:, channel] += 0.1 * size
        for block in blocks:
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                layer.weight[channel] *= 0.12 * abs(size)
                layer.bias[channel] += 0.75 * size / len(blocks)
        module.proj[channel] /= abs(size)  # or all pictures would have nearly one embedding
