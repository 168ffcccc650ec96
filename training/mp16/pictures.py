"""What is kept of a photo: upright pixels of a moderate size, as JPEG without metadata, and two hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from geoengine.engine.errors import PhotoError
from geoengine.engine.photos import read_photo

if TYPE_CHECKING:
    from PIL import Image

_QUALITY = 90  # of the JPEG files
_SMALLEST = 32  # pixels of the shorter side; below are icons and the dots that count readers


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A photo as it is kept; `content` is the SHA-256 of the original, `phash` its 64-bit perceptual hash."""

    jpeg: bytes
    width: int
    height: int
    content: bytes
    phash: int


def read_picture(data: bytes, side: int) -> Picture:
    """Return what is kept of a photo's file; its shorter side becomes `side` pixels at most.

    Raises PhotoError for what is no photo, or smaller than anything could be seen on.
    """
    from PIL import Image

    image = Image.fromarray(read_photo(data).pixels)
    shorter = min(image.size)
    if shorter < _SMALLEST:
        raise PhotoError(f"the photo has only {image.width} x {image.height} pixels")
    if shorter > side:
        width, height = (max(1, round(length * side / shorter)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return Picture(
        jpeg=buffer.getvalue(),
        width=image.width,
        height=image.height,
        content=hashlib.sha256(data).digest(),
        phash=perceptual_hash(image),
    )


def perceptual_hash(image: Image.Image) -> int:
    """Return the pHash of a Pillow image: signs of the lowest 8 x 8 frequencies against their median."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)
