"""What decodes tiles: OpenCV on the CPU, or nvImageCodec in batches, on an NVIDIA GPU's JPEG units.

The two differ by the rounding of a pixel here and there, and their embeddings agree to a cosine of 0.999.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from geoengine.engine.cores import available_cores
from geoengine.engine.errors import SourceError
from geoengine.engine.sources.decode import Picture, picture_bytes, read_picture

OPENCV = "opencv"
NVIMGCODEC = "nvimgcodec"
AUTO = "auto"

VARIABLE = "GEOENGINE_DECODER"
"""The environment variable that names what decodes tiles."""

EXTRA = "pip install 'geoengine[gpu]'"
"""What installs nvImageCodec."""

_MODULE = "nvidia.nvimgcodec"
_JPEG = b"\xff\xd8"
_BATCH = 256  # tiles; below 128 the GPU's units do not pay
_HARDWARE_SHARE = 0.65  # of a batch, for the JPEG units; the rest keeps the GPU's other decoder busy
_MOST_PIXELS = 4096 * 4096  # of a picture that goes to the GPU
_ROUNDS = 5

_log = logging.getLogger(__name__)


class Decoder(Protocol):
    """Turns the bytes of tiles into pictures; threads may call it at the same time."""

    @property
    def name(self) -> str:
        """What decodes, for people and logs."""
        ...

    @property
    def batch(self) -> int:
        """The most tiles in a call."""
        ...

    def takes(self, tile: object) -> bool:
        """Tell whether a tile gains by being decoded among others; `read_picture` is as good for the rest."""
        ...

    def decode(self, tiles: Sequence[object]) -> list[Picture | None]:
        """Return each tile's picture, or None for what is none; see `read_picture`."""
        ...


class OpenCvDecoder:
    """Decodes every tile by itself, in the thread that calls."""

    name = "OpenCV"
    batch = 1

    def takes(self, tile: object) -> bool:
        """Take none: no tile gains by waiting for others; see `Decoder`."""
        return False

    def decode(self, tiles: Sequence[object]) -> list[Picture | None]:
        """Return each tile's picture, or None; see `Decoder`."""
        return [read_picture(tile) for tile in tiles]


class NvImageCodecDecoder:
    """Decodes JPEG tiles in batches on the first GPU, or, with `on_gpu` off, on the CPU.

    What is no JPEG, and what nvImageCodec cannot decode, OpenCV decodes: the GPU's decoders know fewer kinds.
    Raises SourceError when nvImageCodec is not installed or cannot run here.
    """

    name = "nvImageCodec"
    batch = _BATCH

    def __init__(self, *, on_gpu: bool = True) -> None:
        if not is_installed():
            raise SourceError(f"nvImageCodec is not installed, and decoding with it needs it: run `{EXTRA}`")
        try:
            with _quiet():
                from nvidia import nvimgcodec
            self._module: Any = nvimgcodec
            self._decoder = self._open(on_gpu)
        except (ImportError, OSError, RuntimeError) as error:
            reason = _words(error)
            raise SourceError(f"nvImageCodec cannot run here ({reason}): set {VARIABLE}={OPENCV}") from error
        # A tile lies as its bytes say, whatever its EXIF data claim.
        self._params = nvimgcodec.DecodeParams(
            apply_exif_orientation=False, sample_format=nvimgcodec.SampleFormat.I_BGR
        )
        self._lock = threading.Lock()  # two threads in one decoder wait for each other for ever
        self._warned = False

    def takes(self, tile: object) -> bool:
        """Take JPEG tiles: others would wait in a batch, and be decoded by OpenCV all the same."""
        return isinstance(tile, bytes) and tile.startswith(_JPEG)

    def decode(self, tiles: Sequence[object]) -> list[Picture | None]:
        """Return each tile's picture, or None; see `Decoder`."""
        data = [picture_bytes(tile) for tile in tiles]
        streams = {row: stream for row, part in enumerate(data) if (stream := self._stream(part)) is not None}
        pictures = dict(zip(streams, self._decoded(list(streams.values())), strict=True))
        return [
            picture if (picture := pictures.get(row)) is not None or part is None else read_picture(part)
            for row, part in enumerate(data)
        ]

    def _open(self, on_gpu: bool) -> Any:  # noqa: ANN401 - the package has no types
        kinds, backend = self._module.BackendKind, self._module.Backend
        if not on_gpu:
            return self._module.Decoder(
                device_id=self._module.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=available_cores(),
                backends=[backend(kinds.CPU_ONLY)],
            )
        return self._module.Decoder(
            max_num_cpu_threads=available_cores(),
            backends=[
                backend(kinds.HW_GPU_ONLY, load_hint=_HARDWARE_SHARE),
                backend(kinds.HYBRID_CPU_GPU),
                backend(kinds.GPU_ONLY),
            ],
            options=":num_cuda_streams=4",
        )

    def _stream(self, data: bytes | None) -> object | None:
        """Return what nvImageCodec reads a JPEG of a usual kind and size through, None for anything else."""
        if data is None or not data.startswith(_JPEG):
            return None
        try:
            stream = self._module.CodeStream(data)
            usual = stream.num_channels in (1, 3) and stream.width * stream.height <= _MOST_PIXELS
        except RuntimeError:
            return None
        return stream if usual else None

    def _decoded(self, streams: list[object]) -> list[Picture | None]:
        if not streams:
            return []
        try:
            with self._lock:
                images = self._decoder.decode(streams, params=self._params)
                return [None if image is None else np.asarray(image.cpu()) for image in images]
        except RuntimeError as error:
            if not self._warned:
                self._warned = True
                _log.warning("nvImageCodec fails, OpenCV decodes: %s", _words(error))
            return [None] * len(streams)


def is_installed() -> bool:
    """Tell whether nvImageCodec is installed, without importing it."""
    try:
        return importlib.util.find_spec(_MODULE) is not None
    except ModuleNotFoundError:  # nothing at all of NVIDIA's
        return False


class _Choice:
    """What decodes the tiles of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.gpu = False
        self.decoder: Decoder | None = None


_choice = _Choice()


def tile_decoder() -> Decoder:
    """Return what decodes tiles in this process, chosen when it is first asked for.

    GEOENGINE_DECODER names it: opencv, nvimgcodec, or auto, which is OpenCV but for processes with a backend
    on a GPU; there it is nvImageCodec, if that is installed and turns out faster. Raises SourceError for
    another name, and when what is named cannot run.
    """
    with _choice.lock:
        if _choice.decoder is None:
            _choice.decoder, reason = choose_decoder(gpu=_choice.gpu)
            _log.debug("%s decodes tiles: %s", _choice.decoder.name, reason)
        return _choice.decoder


def allow_gpu_decoding() -> None:
    """Let the tiles of this process be decoded on the GPU, as a backend runs there."""
    with _choice.lock:
        if not _choice.gpu:
            _choice.gpu, _choice.decoder = True, None


def choose_decoder(*, gpu: bool) -> tuple[Decoder, str]:
    """Return what decodes tiles as the environment says, and why; `gpu` tells whether a backend runs there.

    Raises SourceError as `tile_decoder` does.
    """
    name = os.environ.get(VARIABLE, "").strip().lower() or AUTO
    if name == NVIMGCODEC:
        return NvImageCodecDecoder(), f"{VARIABLE} names it"
    if name not in (AUTO, OPENCV):
        raise SourceError(f"{VARIABLE} is {name!r}: it must be {AUTO}, {OPENCV} or {NVIMGCODEC}")
    usual: Decoder = OpenCvDecoder()
    if name == OPENCV:
        return usual, f"{VARIABLE} names it"
    if not gpu:
        return usual, "nvImageCodec is for backends on an NVIDIA GPU"
    if not is_installed():
        return usual, "nvImageCodec, which may be faster on a GPU, is not installed"
    try:
        other: Decoder = NvImageCodecDecoder()
    except SourceError as error:
        return usual, str(error)
    seconds = {decoder: seconds_per_batch(decoder) for decoder in (usual, other)}
    best = min(seconds, key=lambda decoder: seconds[decoder])
    taken = (f"{decoder.name} takes {1e3 * seconds[decoder]:.1f} ms" for decoder in seconds)
    return best, f"for {_BATCH} tiles {', '.join(taken)}"


def seconds_per_batch(decoder: Decoder, tiles: Sequence[bytes] | None = None) -> float:
    """Return the median time of a batch of tiles, made ones unless given; on all cores with OpenCV."""
    data = list(tiles or [made_tile()] * _BATCH)
    taken = []
    with ThreadPoolExecutor(available_cores()) as pool:
        parts = [data[start : start + decoder.batch] for start in range(0, len(data), decoder.batch)]
        for _ in range(1 + _ROUNDS):
            start_s = time.perf_counter()
            if decoder.batch == 1:
                list(pool.map(decoder.decode, parts))
            else:
                for part in parts:
                    decoder.decode(part)
            taken.append(time.perf_counter() - start_s)
    return statistics.median(taken[1:])  # the first round wakes threads and allocates


def made_tile(size: int = 256) -> bytes:
    """Return a tile as servers of imagery send it: JPEG, 256 pixels, some 15 KB."""
    import cv2

    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    smooth = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), np.empty(0), 0, 255, cv2.NORM_MINMAX)
    return cv2.imencode(".jpg", smooth, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def _words(error: Exception) -> str:
    """Return what nvImageCodec says went wrong, without the place in its source."""
    return str(error).partition("\n")[0].partition(" at /")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off stderr what nvImageCodec says, while it is loaded, of formats that no tile has."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
