"""Tables, folders and tars of photos, for the tests of what reads them."""

import io
import json
import tarfile

import numpy as np
from made_photos import encoded, scene
from PIL import Image


def jpeg(shade=0, size=(24, 32)):
    """A small JPEG file; photos of different shades differ."""
    pixels = scene(*size)
    pixels[..., 2] = shade
    return encoded(pixels, "JPEG")


def write_table(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_tar(path, samples):
    """A WebDataset tar of {key: {suffix: bytes or JSON value}}."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, content in members.items():
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def distinct_photo(seed, *, height=96, width=128, quality=90, **options):
    """A JPEG file that looks unlike those of other seeds, and like those of this seed in other sizes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=quality, **options)
