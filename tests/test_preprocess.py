"""The square that the photo encoder sees, against torchvision's arithmetic and torchvision itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from geoengine.engine.preprocess import to_square

SHAPES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (224, 224),
    (225, 224),
    (224, 225),
    (500, 333),
    (333, 500),
    (100, 51),
    (2, 120),
]


def random_pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference(pixels, size):
    """torchvision.transforms.functional.resize and center_crop on a Pillow image, written out."""
    image = Image.fromarray(pixels)
    width, height = image.size
    if width <= height:
        image = image.resize((size, int(size * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(size * width / height), size), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2.0) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([32, 112, 224]), st.integers(0, 99))
def test_it_is_torchvisions_arithmetic(height, width, size, seed):
    if max(height, width) <= 64 * min(height, width):
        pixels = random_pixels(height, width, seed)
        np.testing.assert_array_equal(to_square(pixels, size), reference(pixels, size))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("mode", "resize"), [("shortest", 224), ("squash", (224, 224))])
def test_it_is_torchvision(shape, mode, resize):
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = random_pixels(*shape)
    transform = transforms.Compose(
        [
            transforms.Resize(resize, transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.CenterCrop(224),
        ]
    )
    expected = np.asarray(transform(Image.fromarray(pixels)))
    np.testing.assert_array_equal(to_square(pixels, 224, mode), expected)


def test_one_pixel_fills_the_square():
    square = to_square(np.array([[[10, 200, 30]]], np.uint8), 224)
    assert square.shape == (224, 224, 3)
    assert (square == (10, 200, 30)).all()


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1), (3, 90_001), (90_002, 3)])
def test_the_middle_of_a_very_long_image(shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[...] = (
        np.linspace(0, 255, max(shape))
        .astype(np.uint8)
        .reshape(1, -1, 1)
        .reshape((1, -1, 1) if shape[1] > shape[0] else (-1, 1, 1))
    )
    square = to_square(pixels, 224)
    assert square.shape == (224, 224, 3)
    assert abs(square.astype(int) - 127).max() <= 1


@pytest.mark.parametrize("length", [999, 1000])
def test_a_very_long_image_is_cut_around_its_middle(length):
    pixels = random_pixels(4, length)
    size = 16  # few enough pixels that the reference can resize the whole
    ours, whole = to_square(pixels, size).astype(int), reference(pixels, size).astype(int)
    assert np.abs(ours - whole).mean() < 8  # of noise whose neighbours differ by 85


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
    ids=["float", "grey", "empty"],
)
def test_anything_else_is_refused(pixels):
    with pytest.raises(ValueError, match=r"pixels must be uint8 of shape \(H, W, 3\)"):
        to_square(pixels, 224)
