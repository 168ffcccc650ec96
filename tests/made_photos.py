"""Photos made on the spot, for the tests of reading them."""

import io
import struct

import numpy as np
from PIL import Image

MODEL, ORIENTATION, GPS = 0x0110, 0x0112, 0x8825


def scene(height=48, width=80):
    """Four corners of different colours, blended: it survives lossy codecs, and no turn of it is itself."""
    down, right = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    corners = np.array([[[200, 30, 40], [40, 190, 60]], [[30, 50, 210], [220, 210, 60]]], float)
    top = corners[0, 0] * (1 - right[..., None]) + corners[0, 1] * right[..., None]
    bottom = corners[1, 0] * (1 - right[..., None]) + corners[1, 1] * right[..., None]
    return np.rint(top * (1 - down[..., None]) + bottom * down[..., None]).astype(np.uint8)


def encoded(image, kind, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.from_pillow(image).save(buffer, **options)
    else:
        image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif_with(tag, value):
    exif = Image.Exif()
    exif[tag] = value
    return exif


def tiff(pixels, side, bits, *extra, big=False):
    """A square grey TIFF file of one strip, by hand; `extra` are directory entries (tag, type, value)."""
    number, entry = ("<Q", 20) if big else ("<I", 12)
    entries = [(256, 3, side), (257, 3, side), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, None)]
    entries += [(277, 3, 1), (278, 3, side), (279, 4, len(pixels)), *extra]
    entries.sort(key=lambda row: row[0])
    if big:
        head = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, len(entries))
    else:
        head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    start = len(head) + entry * len(entries) + struct.calcsize(number)
    for tag, kind, value in entries:
        head += struct.pack("<HH", tag, kind) + struct.pack(number, 1)
        head += struct.pack(number, start if tag == 273 else value)
    return head + struct.pack(number, 0) + pixels


def assert_close(pixels, expected, tolerance=0):
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= tolerance
