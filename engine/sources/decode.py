"""From the bytes of tiles to batches of pixels: what the tile sources that read files and servers share."""

import queue
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from geoengine.engine.sources import TileBatch

CHUNK = 64  # tiles in a batch, except in the last one of a call
_WINDOW = 4 * CHUNK  # tiles under way while the caller is busy with a batch: 50 MB of 256-pixel tiles
_MOST_BYTES = 16 << 20  # of a gzip'd tile, unpacked
DEFAULT_TILE_SIZE = 256

Pixels = npt.NDArray[np.uint8]
Job = Callable[[], Pixels | None]


def decode_tile(data: object) -> Pixels | None:
    """Decode a tile's PNG, JPEG or WebP bytes, gzip'd or not, to uint8[H, W, 3], RGB.

    Returns None, a missing tile, for bytes cut short and for anything that is not a picture, even not bytes
    at all, which a database may hold. What is transparent becomes white, as in photos.
    """
    import cv2

    if isinstance(data, bytes) and data.startswith(b"\x1f\x8b"):
        data = _unpacked(data)
    if not isinstance(data, bytes) or not data or not _is_whole(data):
        return None
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    return None if decoded is None else _rgb(np.asarray(decoded))


def stream(
    jobs: Iterable[tuple[int, Job]], *, workers: int, tile_size: Callable[[Pixels], int]
) -> Iterator[TileBatch]:
    """Run jobs in threads and yield their tiles in batches of CHUNK as they finish, in any order.

    A job is a row number of the request and a function that gives the tile's pixels or, when there is no such
    tile, None; `jobs` itself is drawn from in the caller's thread, never more than a few batches ahead.
    `tile_size(pixels)` is asked once, with the first tile that arrives, for the side that all tiles are
    brought to. What a job raises is raised here, and ends the stream.
    """
    finished: queue.SimpleQueue[Future[Pixels | None]] = queue.SimpleQueue()
    position_of: dict[Future[Pixels | None], int] = {}
    ready: list[tuple[int, Pixels]] = []
    jobs = iter(jobs)
    side: int | None = None
    pool = ThreadPoolExecutor(workers, thread_name_prefix="geoengine-tiles")
    try:
        while True:
            for position, job in islice(jobs, _WINDOW - len(position_of)):
                future = pool.submit(job)
                position_of[future] = position
                future.add_done_callback(finished.put)
            if not position_of:
                break
            future = finished.get()
            position, pixels = position_of.pop(future), future.result()
            if pixels is not None:
                side = side or tile_size(pixels)
                ready.append((position, pixels))
            if len(ready) == CHUNK:
                yield _batch(ready, side)
                ready = []
        if ready:
            yield _batch(ready, side)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _rgb(pixels: npt.NDArray[Any]) -> Pixels | None:
    """Return 8 or 16-bit grey, BGR or BGRA, as OpenCV gives them, as uint8[H, W, 3], RGB; else None."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,), (4,)):
        return None
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] == 4:
        opaque = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(pixels[..., ::-1])


def _batch(tiles: list[tuple[int, Pixels]], side: int | None) -> TileBatch:
    assert side is not None  # the first tile set it
    pixels = np.stack([_resized(tile, side) for _, tile in tiles])  # (tiles, side, side, 3)
    return TileBatch(np.array([position for position, _ in tiles], np.int64), pixels)


def _resized(pixels: Pixels, side: int) -> Pixels:
    if pixels.shape[:2] == (side, side):
        return pixels
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


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
