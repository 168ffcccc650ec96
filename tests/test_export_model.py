"""The explicit trunk and heads against open_clip's own tower and preprocessing."""

import dataclasses

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image

from geoengine.engine.errors import ExportError
from geoengine.export.encoders import VisionConfig
from geoengine.export.model import Head, Trunk
from geoengine.export.resample import resize_matrix

torch.set_num_threads(1)
TINY = VisionConfig(image_size=16, patch_size=8, width=32, layers=3, heads=4, output_dim=24, quick_gelu=True)
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


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
    ("source", "target"),
    [(256, 224), (512, 224), (128, 112), (100, 112), (7, 3), (3, 16), (1, 4)],
)
def test_resize_equals_pillow(source, target):
    vision = dataclasses.replace(TINY, image_size=target, patch_size=target)
    trunk = Trunk(vision.build(), blocks=0, side=source, mean=MEAN, std=STD)
    batch = pictures(source)
    ours = trunk.resize(torch.from_numpy(batch)).permute(0, 2, 3, 1).numpy()
    size = (target, target)
    pillow = np.stack([Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in batch])
    assert np.abs(ours - pillow).max() <= 1
    assert (ours == pillow).mean() > 0.9999


def test_resize_rows_sum_to_one():
    matrix = resize_matrix(512, 224)
    assert matrix.shape == (224, 512)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-5)


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("trunk_layers", [0, 1, 2])
@pytest.mark.parametrize(
    "extra", [{}, {"no_ln_pre": True}, {"ls_init_value": 0.3}, {"final_ln_after_pool": True}]
)
def test_trunk_and_head_equal_the_tower(quick_gelu, trunk_layers, extra):
    torch.manual_seed(3)
    vision = dataclasses.replace(TINY, quick_gelu=quick_gelu)
    activation = type(vision.build().transformer.resblocks[0].mlp.gelu)
    tower = VisionTransformer(
        image_size=16, patch_size=8, width=32, layers=3, heads=4, mlp_ratio=4.0, output_dim=24,
        act_layer=activation, **extra,
    ).eval()  # fmt: skip
    for parameter in tower.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = torch.from_numpy(pictures(16))
    normalised = batch.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]
    normalised = normalised / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(tower(normalised), dim=-1)
        tokens = Trunk(tower, blocks=trunk_layers, side=16, mean=MEAN, std=STD)(batch)
        embedding = Head(tower, trunk_layers=trunk_layers)(tokens)
    assert tokens.shape == (3, 5, 32)
    torch.testing.assert_close(embedding, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_type": "avg"}, 'pooling "avg"'),
        ({"attentional_pool": True}, "attentional pooling"),
        ({"qk_norm": True}, "custom attention blocks"),
        ({"output_tokens": True}, "token outputs"),
        ({"image_size": (16, 24)}, "16x24 pixels"),
        ({"act_layer": torch.nn.ReLU}, "activation ReLU"),
    ],
)
def test_other_towers_are_refused(options, message):
    sizes = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "heads": 4, "mlp_ratio": 4.0}
    tower = VisionTransformer(**{**sizes, "output_dim": 24, **options})
    with pytest.raises(ExportError, match=message):
        Trunk(tower, blocks=1, side=16, mean=MEAN, std=STD)
    with pytest.raises(ExportError, match="only open_clip's VisionTransformer"):
        Head(torch.nn.Linear(2, 2), trunk_layers=0)
