"""From a tile's bytes to its picture: what the tile sources that read files and servers share.

OpenCV decodes, and its colour conversion writes into the staging rows. On one core that takes 229 us for a
JPEG of 256 pixels, against 168 us with a turbojpeg binding; encoding the tile takes 14 ms, so another
dependency would gain nothing.
"""

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

_MOST_BYTES = 16 << 20  # of a gzip'd tile, unpacked
_CHANNELS = ((), (3,), (4,))  # grey, BGR, BGRA

Pixels = npt.NDArray[np.uint8]
Picture = npt.NDArray[Any]
"""A decoded tile as OpenCV has it: uint8 or uint16, grey, BGR or BGRA."""


def picture_bytes(data: object) -> bytes | None:
    """Return a tile's PNG, JPEG or WebP bytes, unpacked; None for those cut short and what is not bytes."""
    if isinstance(data, bytes) and data.startswith(b"\x1f\x8b"):
        data = _unpacked(data)
    return data if isinstance(data, bytes) and data and _is_whole(data) else None


def read_picture(data: object) -> Picture | None:
    """Decode a tile's PNG, JPEG or WebP bytes, gzip'd or not.

    Returns None, a missing tile, for bytes cut short and for anything that is not a picture, even not bytes
    at all, which a database may hold.
    """
    import cv2

    data = picture_bytes(data)
    if data is None:
        return None
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if picture is None or picture.dtype not in (np.uint8, np.uint16) or picture.shape[2:] not in _CHANNELS:
        return None
    return np.asarray(picture)


def write_rgb(picture: Picture, out: Pixels) -> None:
    """Write a picture into `out`, uint8[S, S, 3], as RGB; what is transparent becomes white, as in photos.

    A picture of another size is resized.
    """
    import cv2

    if picture.dtype == np.uint16:
        picture = (picture >> 8).astype(np.uint8)
    if picture.shape[2:] == (4,):
        opaque = picture[..., 3:].astype(np.uint16)
        picture = ((picture[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)
    code = cv2.COLOR_GRAY2RGB if picture.ndim == 2 else cv2.COLOR_BGR2RGB
    if picture.shape[:2] == out.shape[:2]:
        cv2.cvtColor(picture, code, dst=out)
        return
    from PIL import Image

    rgb = Image.fromarray(np.asarray(cv2.cvtColor(picture, code), np.uint8))
    out[:] = np.asarray(rgb.resize((out.shape[1], out.shape[0]), Image.Resampling.BICUBIC))


def decode_tile(data: object) -> Pixels | None:
    """Decode a tile's bytes to uint8[H, W, 3], RGB, or None; see `read_picture` and `write_rgb`."""
    picture = read_picture(data)
    if picture is None:
        return None
    pixels = np.empty((*picture.shape[:2], 3), np.uint8)
    write_rgb(picture, pixels)
    return pixels


def format_of(data: bytes) -> str:
    """Return what MBTiles calls the format of a picture: png, jpg or webp."""
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data.startswith(b"RIFF") else "jpg"


def _is_whole(data: bytes) -> bool:
    """Tell whether a picture's last bytes are there: decoders paint what is missing of a JPEG file grey."""
    if data.startswith(b"\xff\xd8"):
        return data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
    if data.startswith(b"\x89PNG"):
        return b"IEND" in data[-16:]
    if data.startswith(b"RIFF"):
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return True


def _unpacked(data: bytes) -> bytes | None:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(data, _MOST_BYTES)
    except zlib.error:
        return None
    return unpacked if unpacker.eof else None
