"""The geometry of a photo before it is encoded: one square of fixed size out of any shape."""

import numpy as np
import numpy.typing as npt

_LONGEST_RATIO = 64


def to_square(
    pixels: npt.NDArray[np.uint8], size: int, resize_mode: str = "shortest"
) -> npt.NDArray[np.uint8]:
    """Bring an image to `size` x `size` pixels: its middle ("shortest"), or all of it distorted ("squash").

    `pixels` is uint8[H, W, 3], the result uint8[size, size, 3]. "shortest" scales the shorter side to `size`
    and cuts out the square in the middle. It is what open_clip's transform of that resize mode does to a
    Pillow image, bit for bit: torchvision's `Resize(size, BICUBIC)`, whose filter is Pillow's antialiased
    one, then `CenterCrop(size)`; or `Resize((size, size), BICUBIC)`. For "shortest", an
    image more than 64 times as long as wide is first cut to that ratio around its middle, since the resized
    whole could take gigabytes; there the result may be shifted by up to one pixel. Raises ValueError when
    `pixels` has another dtype or shape.
    """
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels must be uint8 of shape (H, W, 3); got {pixels.dtype} {pixels.shape}")
    if resize_mode == "squash":
        return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    pixels = _without_far_ends(pixels)
    height, width = pixels.shape[:2]
    short = min(height, width)
    # torchvision rounds the longer side down and the crop's offset to the nearest even number.
    new_width, new_height = int(size * width / short), int(size * height / short)
    resized = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    return np.array(resized.crop((left, top, left + size, top + size)))


def _without_far_ends(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Cut as many pixels from both ends of the longer side as the ratio allows."""
    height, width = pixels.shape[:2]
    longest = _LONGEST_RATIO * min(height, width)
    rows, columns = (max(0, side - longest) // 2 for side in (height, width))
    return pixels[rows : height - rows, columns : width - columns]
