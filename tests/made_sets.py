"""Tables, folders and tars of photos, for the tests of what reads them."""

import io
import json
import tarfile

from made_photos import encoded, scene


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
