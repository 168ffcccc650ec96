"""Small encoders in int8, and a bundle of them."""

import numpy as np
import torch
from made_encoders import MEAN, STD
from tiny_bundle import write_manifest

from geoengine.export.encoders import VisionConfig
from geoengine.export.int8 import quantize_graphs
from geoengine.export.model import Head, Trunk
from geoengine.export.onnx_graphs import write_heads, write_trunks
from geoengine.export.pictures import sample_pictures

SIDE = 64
MIDDLE = VisionConfig(
    image_size=SIDE, patch_size=16, width=192, layers=5, heads=3, output_dim=64, quick_gelu=True
)
OUTLIERS = {7: 100.0, 40: -60.0, 99: 45.0, 150: -25.0}  # residual channels, times the rest


def make_tower(*, outliers=False, seed=1):
    """A tower with random weights; with `outliers`, like those of CLIP: in the same channels of all tokens.

    LLM.int8 (Dettmers et al., 2022) and SmoothQuant (Xiao et al., 2023) describe them: a few channels of the
    residual stream, 20 to 100 times the rest, for every token, of one sign, growing from the first blocks on.
    """
    torch.manual_seed(seed)
    tower = MIDDLE.build().requires_grad_(False)
    for block in tower.transformer.resblocks:
        for norm in (block.ln_1, block.ln_2):
            norm.weight += 0.15 * torch.randn_like(norm.weight)
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.bias += 0.05 * torch.randn_like(layer.bias)
    if outliers:
        _add_outliers(tower)
    return tower


def _add_outliers(tower):
    blocks = tower.transformer.resblocks
    for channel, size in OUTLIERS.items():
        tower.class_embedding[channel] += 0.2 * size
        tower.positional_embedding[:, channel] += 0.2 * size
        for block in blocks:
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                layer.weight[channel] *= 0.1 * abs(size)
                layer.bias[channel] += 0.4 * size / len(blocks)
        tower.proj[channel] /= abs(size)  # or every picture would have the same embedding


def residual_channels(tower, pictures):
    """The largest size of each channel after each block over the typical one, float[blocks, width]."""
    found = []
    hooks = [
        block.register_forward_hook(lambda module, args, result: found.append(result.abs()))
        for block in tower.transformer.resblocks
    ]
    tower((torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - 0.45) / 0.27)
    for hook in hooks:
        hook.remove()
    ordinary = [channel for channel in range(MIDDLE.width) if channel not in OUTLIERS]
    return np.stack(
        [(x.amax((0, 1)) / x[..., ordinary].pow(2).mean().sqrt()).numpy() for x in found]
    )  # (blocks, width)


def calibrating_pictures(count=48):
    return sample_pictures(SIDE, count, seed=5)


def write_graphs(tower, folder, *, heads=("photo",), sides=(SIDE,), blocks=3):
    """The fp32 files: trunks by side, heads by encoder; the heads have different projections."""
    folder.mkdir(exist_ok=True, parents=True)
    norms = {"mean": MEAN, "std": STD}
    trunks = {side: Trunk(tower, blocks=blocks, side=side, **norms) for side in sides}

    def each():
        for number, encoder in enumerate(heads):
            if number:
                tower.proj.copy_(tower.proj.roll(number, 0))
            yield encoder, Head(tower, trunk_layers=blocks, **norms)

    return write_trunks(trunks, folder, variant="fp32"), write_heads(each(), folder, variant="fp32")


def write_int8(tower, folder, *, smooth=True, **options):
    """The int8 files of a tower, their fp32 ones in a folder beside them."""
    trunks, heads = write_graphs(tower, folder / "float", **options)
    return quantize_graphs(trunks, heads, folder, calibrating_pictures(), smooth=smooth)


def write_int8_bundle(folder, tower, *, levels=(1,), sides=(SIDE, 96), world="planet"):
    """A bundle that has nothing but int8 graphs."""
    encoders = ("photo", *(f"z{z:02d}" for z in levels))
    onnx = folder / "onnx"
    trunks, heads = write_graphs(tower, folder / "float", heads=encoders, sides=sides)
    onnx.mkdir()
    trunks, heads = quantize_graphs(trunks, heads, onnx, calibrating_pictures())
    manifest = {
        "schema": 2,
        "geoengine": "0.1.0",
        "model": "middle",
        "pretrained": "none",
        "world": world,
        "levels": list(levels),
        "embed_dim": MIDDLE.output_dim,
        "image_size": SIDE,
        "mean": list(MEAN),
        "std": list(STD),
        "resize_mode": "shortest",
        "logit_scale": dict.fromkeys(encoders[1:], 20.0),
        "graphs": {
            "int8": {
                "trunks": {str(side): f"onnx/{file.name}" for side, file in trunks.items()},
                "heads": {encoder: f"onnx/{file.name}" for encoder, file in heads.items()},
            }
        },
        "preferred": {},
        "weights": "",
        "files": {},
        "tools": {},
        "parity": {},
    }
    write_manifest(folder, manifest)
    return folder
