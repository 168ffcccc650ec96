"""Trunks and heads as graphs against the towers that they come from, and the resize against Pillow."""

import dataclasses

import numpy as np
import pytest
import torch
from made_encoders import MEAN, SMALL, STD, encode, expected, run_graph, shaken, timm_tower, write_encoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from timm.layers import GELUTanh, GluMlp

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.model import Head, Trunk
from geoengine.export.onnx_graphs import write_trunks
from geoengine.export.resample import resize_matrix

torch.set_num_threads(1)


def pictures(side: int, count: int = 3) -> np.ndarray:
    """uint8[count, side, side, 3]: noise over gradients with hard edges, the hard case for a resize."""
    rng = np.random.default_rng(side)
    ramp = np.linspace(0, 255, side)[None, :, None, None] * rng.random((count, 1, 1, 3))
    noise = rng.integers(-60, 60, (count, side, side, 3))
    picture = ramp + noise
    picture[:, side // 3 : side // 2, side // 4 : side // 2] = 255
    picture[:, side // 2 :, side // 2 : side // 2 + 3] = 0
    return picture.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("source", "target", "patch"),
    [
        (256, 224, 32), (512, 224, 14), (256, 224, 224), (128, 112, 56), (100, 112, 16), (224, 224, 32),
        (7, 3, 3), (3, 16, 1), (1, 4, 2),
    ],
)  # fmt: skip
def test_resize_equals_pillow(source, target, patch, tmp_path):
    tower = dataclasses.replace(SMALL, image_size=target, patch_size=patch).build()
    trunk = Trunk(tower, blocks=None, side=source, mean=MEAN, std=STD)  # gives scaled pixels, in patches
    file = write_trunks({source: trunk}, tmp_path, variant=Variant.fp32)[source]
    batch, grid = pictures(source), target // patch
    tokens = run_graph(file, batch).reshape(-1, grid, grid, 3, patch, patch)
    ours = tokens.transpose(0, 1, 4, 2, 5, 3).reshape(-1, target, target, 3) * 64 + 128
    size = (target, target)
    pillow = np.stack([Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in batch])
    assert np.abs(ours - pillow).max() <= 1
    assert (ours == pillow).mean() > 0.9999


def test_resize_rows_sum_to_one():
    matrix = resize_matrix(512, 224)
    assert matrix.shape == (224, 512)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-5)


def check(tower, folder, blocks):
    """Hold a tower's graphs to the tower."""
    batch = pictures(16)
    files = write_encoder(tower, folder, blocks=blocks)
    np.testing.assert_allclose(encode(files, 16, batch), expected(tower, batch), atol=2e-6)
    return run_graph(files[16], batch)


@pytest.mark.parametrize("activation", [QuickGELU, torch.nn.GELU, GELUTanh])
@pytest.mark.parametrize("blocks", [None, 0, 1, 2])
@pytest.mark.parametrize(
    "extra",
    [{}, {"no_ln_pre": True}, {"ls_init_value": 0.3}, {"final_ln_after_pool": True}, {"pool_type": "avg"}],
)
def test_open_clip_towers(activation, blocks, extra, tmp_path):
    sizes = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "heads": 4, "mlp_ratio": 4.0}
    tower = shaken(VisionTransformer(**sizes, output_dim=24, act_layer=activation, **extra))
    tokens = check(tower, tmp_path, blocks)
    assert tokens.shape == ((3, 4, 192) if blocks is None else (3, 5, 32))


@pytest.mark.parametrize("blocks", [None, 0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},  # as SigLIP
        {"act_layer": "gelu_tanh"},  # as SigLIP's SO400M
        {"class_token": True, "reg_tokens": 2},
        {"reg_tokens": 1, "pool_include_prefix": True},
        {"class_token": True, "global_pool": "token", "pre_norm": True, "act_layer": "quick_gelu"},
        {"global_pool": "avg", "reg_tokens": 1, "no_embed_class": True, "init_values": 0.3},
        {"global_pool": "avg", "fc_norm": False, "num_classes": 24, "qkv_bias": False},
        {"proj": "linear"},
    ],
)
def test_timm_towers(blocks, options, tmp_path):
    check(shaken(timm_tower(**options)), tmp_path, blocks)


def test_pixels_beyond_the_last_whole_patch_are_not_seen(tmp_path):
    sizes = {"image_size": 20, "patch_size": 8, "width": 32, "layers": 2, "heads": 4, "mlp_ratio": 4.0}
    tower = shaken(VisionTransformer(**sizes, output_dim=24))
    files = write_encoder(tower, tmp_path, sides=(20, 30))
    for side in (20, 30):
        batch = pictures(side)
        resized = [Image.fromarray(picture).resize((20, 20), Image.Resampling.BICUBIC) for picture in batch]
        np.testing.assert_allclose(encode(files, side, batch), expected(tower, np.stack(resized)), atol=1e-4)


def test_a_tower_without_projection(tmp_path):
    tower = shaken(SMALL.build())
    tower.proj = None
    check(tower, tmp_path, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_type": "none"}, 'pooling "none"'),
        ({"attentional_pool": True}, "attentional pooling"),
        ({"qk_norm": True}, "custom attention blocks"),
        ({"output_tokens": True}, "token outputs"),
        ({"image_size": (16, 24)}, "16x24 pixels"),
        ({"act_layer": torch.nn.ReLU}, "activation ReLU"),
    ],
)
def test_other_open_clip_towers_are_refused(options, message):
    sizes = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "heads": 4, "mlp_ratio": 4.0}
    tower = VisionTransformer(**{**sizes, "output_dim": 24, **options})
    with pytest.raises(ExportError, match=message):
        Trunk(tower, blocks=1, side=16, mean=MEAN, std=STD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "custom blocks"),
        ({"mlp_layer": GluMlp}, "custom blocks"),
        ({"global_pool": "max"}, 'pooling "max"'),
        ({"pos_embed": ""}, "no position embedding"),
        ({"norm_layer": "rmsnorm"}, "the normalisation RmsNorm"),
        ({"proj": "mlp"}, "a projection of several layers"),
    ],
)
def test_other_timm_towers_are_refused(options, message):
    with pytest.raises(ExportError, match=message):
        Head(timm_tower(**options), trunk_layers=1, mean=MEAN, std=STD)


def test_several_layers_before_the_patches_are_refused():
    tower = timm_tower()
    tower.trunk.patch_embed.proj = torch.nn.Identity()  # as timm's HybridEmbed has
    with pytest.raises(ExportError, match="a patch embedding of several layers"):
        Head(tower, trunk_layers=1, mean=MEAN, std=STD)


def test_networks_that_are_no_vision_transformers_are_refused():
    with pytest.raises(ExportError, match="type Linear cannot be exported"):
        Head(torch.nn.Linear(2, 2), trunk_layers=0, mean=MEAN, std=STD)
    tower = TimmModel("test_resnet", embed_dim=24, image_size=16, pool="avg", proj="linear")
    with pytest.raises(ExportError, match=r"type ResNet \(timm\) cannot be exported"):
        Head(tower, trunk_layers=0, mean=MEAN, std=STD)
