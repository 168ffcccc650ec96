"""Preprocessing in the graph against open_clip's own transform, for tiles and for photos."""

import numpy as np
import open_clip
import pytest
import torch
from made_encoders import run_graph
from PIL import Image

from geoengine.engine.manifest import RESIZE_MODES, Variant
from geoengine.engine.preprocess import to_square
from geoengine.export.encoders import EncoderSet, VisionConfig
from geoengine.export.onnx_graphs import write_heads, write_trunks
from geoengine.export.pictures import sample_pictures
from geoengine.export.reference import reference_embeddings

torch.set_num_threads(1)
SIDES = (224, 256, 512)
VISION = VisionConfig(image_size=224, patch_size=32, width=64, layers=2, heads=4, output_dim=32)
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SIGLIP = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def encoder_set(resize_mode, trunk_layers):
    torch.manual_seed(2)
    tower = VISION.build().requires_grad_(False)
    return EncoderSet(
        model="small", pretrained="none", world="earth", towers={"photo": tower, "z04": tower}, levels=(4,),
        trunk_layers=trunk_layers, resize_mode=resize_mode, logit_scale={"z04": 100.0},
        **(SIGLIP if resize_mode == "squash" else CLIP),
    )  # fmt: skip


def open_clip_pixels(picture, resize_mode):
    """What open_clip's transform makes of a picture before mean and std, float32[224, 224, 3] in 0 to 1."""
    transform = open_clip.image_transform(
        224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic", resize_mode=resize_mode
    )
    return transform(Image.fromarray(picture)).permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def patch_trunks(tmp_path_factory):
    """Trunks without weights, which give the scaled pixels."""
    encoders = encoder_set("shortest", None)
    folder = tmp_path_factory.mktemp("patches")
    return write_trunks({side: encoders.trunk(side) for side in SIDES}, folder, variant=Variant.fp32)


def our_pixels(patch_trunks, batch):
    """The graph's pixels before mean and std, float32[n, 224, 224, 3] in 0 to 1."""
    patches = run_graph(patch_trunks[batch.shape[1]], batch) * 64 + 128
    grid = patches.reshape(-1, 7, 7, 3, 32, 32).transpose(0, 1, 4, 2, 5, 3)
    return grid.reshape(-1, 224, 224, 3) / 255


@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
@pytest.mark.parametrize("side", SIDES)
def test_tiles(patch_trunks, side, resize_mode):
    tiles = sample_pictures(side, 8, seed=4)
    theirs = np.stack([open_clip_pixels(tile, resize_mode) for tile in tiles])
    assert np.abs(our_pixels(patch_trunks, tiles) - theirs).max() <= 1.5 / 255


@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
@pytest.mark.parametrize("shape", [(300, 512), (512, 301), (224, 400), (100, 60)])
def test_photos(patch_trunks, shape, resize_mode):
    photo = sample_pictures(max(shape), 4, seed=5)[3, : shape[0], : shape[1]]
    ours = our_pixels(patch_trunks, to_square(photo, 224, resize_mode)[None])
    assert np.abs(ours[0] - open_clip_pixels(photo, resize_mode)).max() <= 1.5 / 255


@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_embeddings(tmp_path, resize_mode):
    encoders = encoder_set(resize_mode, 1)
    trunks = write_trunks({side: encoders.trunk(side) for side in SIDES}, tmp_path, variant=Variant.fp32)
    (head,) = write_heads([("z04", encoders.head("z04"))], tmp_path, variant=Variant.fp32).values()
    for side in SIDES:
        tiles = sample_pictures(side, 8, seed=6)
        found = run_graph(head, run_graph(trunks[side], tiles))
        assert (found * reference_embeddings(encoders, "z04", tiles)).sum(1).min() >= 0.9999
