"""Reading photos: any common image file to 8-bit RGB, upright, or one sentence that says why not."""

import os
import re
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, SupportsFloat

import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import PhotoError, PhotoKindError, PhotoSizeError
from geoengine.engine.tiles import LngLat

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

PHOTO_NAME = re.compile(r"[^.].*\.(avif|bmp|gif|heic|heif|hif|jfif|jpe?g|png|tiff?|webp)", re.IGNORECASE)
"""Names of image files that are not hidden."""

_KINDS = "JPEG, PNG, WebP, TIFF, AVIF, HEIC, GIF, BMP"
_HEADER_BYTES = 256  # enough for the list of brands that tells AVIF from HEIC
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_WIDTH_TAG, _HEIGHT_TAG, _BITS_PER_SAMPLE_TAG, _ORIENTATION_TAG, _GPS_TAG = 256, 257, 258, 274, 34853

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoLimits:
    """What a photo may cost: `max_pixels` is compared with width x height before anything is decoded."""

    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise PhotoError(f"the pixel limit must be at least 1; got {self.max_pixels}")


_DEFAULT_LIMITS = PhotoLimits()


@dataclass(frozen=True, slots=True, eq=False)
class Photo:
    """A photo in memory: `name` for messages, and `pixels`, uint8[H, W, 3], RGB, upright."""

    name: str
    pixels: Pixels


def read_photo(
    source: "str | os.PathLike[str] | bytes | npt.NDArray[Any] | Image.Image",
    *,
    limits: PhotoLimits = _DEFAULT_LIMITS,
    name: str | None = None,
) -> Photo:
    """Read a photo and turn it upright as its EXIF orientation says; nothing else of its metadata is used.

    `source` is a path, the bytes of an image file, a Pillow image, or uint8[H, W, 3] (RGB), uint8[H, W]
    (grey) or uint8[H, W, 4] (RGBA). `name` is what messages call the photo; without it, the path. 16-bit
    pixels are scaled to 8 bits; of an animation the first frame is read; colour profiles are ignored. What is
    transparent becomes white, the paper on which such pictures are meant to be seen; the colours stored under
    full transparency are leftovers, mostly black, that no viewer shows. Raises PhotoError.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        name = name or "the array"
        if source.dtype != np.uint8 or source.ndim not in (2, 3):
            raise PhotoError(f"{name}: pixels must be uint8[H, W, 3]; got {source.dtype} {source.shape}")
        _check_size((source.shape[1], source.shape[0]), name, limits)
        return Photo(name, np.array(_colour(source, name)))  # a copy, which the caller's changes do not reach
    if isinstance(source, Image.Image):
        name = name or getattr(source, "filename", "") or "the image"
        _check_size(source.size, name, limits)
        return Photo(name, _read_image(source, name))
    name = name or _default_name(source)
    with opened_photo(source, name) as stream:
        try:
            image = _open_image(stream, name)
        except _UnknownLayout:
            return Photo(name, _read_unusual_tiff(stream, name, limits))
        _check_size(image.size, name, limits)
        return Photo(name, _read_image(image, name))


def read_gps(source: str | os.PathLike[str] | bytes) -> LngLat | None:
    """Return the position in a photo's EXIF GPS tags; None when there is none or it makes no sense.

    It is for comparison with an answer only, and never takes part in finding one. Raises PhotoError when the
    file cannot be opened as an image.
    """
    name = _default_name(source)
    with opened_photo(source, name) as stream:
        try:
            image = _open_image(stream, name)
        except _UnknownLayout:
            return None
        try:
            with _quietly():
                tags = dict(image.getexif().get_ifd(_GPS_TAG))
            lat, lng = _degrees(tags[1], tags[2], "NS", 90), _degrees(tags[3], tags[4], "EW", 180)
        except Exception:  # metadata may hold anything, and Pillow's parser raises accordingly
            return None
    # Cameras without a fix write 0, 0.
    return LngLat(lng, lat) if lng or lat else None


def expand_photo_paths(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the paths, each folder replaced by the image files in it, sorted by name.

    Image files are known by their suffix; hidden files and folders inside the folder are left out. The path
    of a file is kept whatever its suffix. Raises PhotoError for a path that does not exist, and for a folder
    without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        try:
            if not path.is_dir():
                path.stat()
                found.append(path)
                continue
            inside = sorted(p for p in path.iterdir() if PHOTO_NAME.fullmatch(p.name) and p.is_file())
        except (OSError, ValueError) as error:
            raise PhotoError(f"{path}: {_why_not_opened(error)}") from error
        if not inside:
            raise PhotoError(f"{path}: the folder has no images directly in it ({_KINDS})")
        found += inside
    return found


# --- opening -----------------------------------------------------------------------------------------------


class _UnknownLayout(Exception):
    """A TIFF file whose kind of pixels Pillow does not know."""


# `warnings.catch_warnings` changes the state of the whole process, and two threads inside it at once can
# leave it changed; so only one thread at a time is.
_warnings_lock = threading.Lock()


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Pillow's warnings about damaged metadata and about large images from the user."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _default_name(source: str | os.PathLike[str] | bytes) -> str:
    return "the photo" if isinstance(source, bytes) else os.fspath(source)


@contextmanager
def opened_photo(source: str | os.PathLike[str] | bytes, name: str) -> Iterator[BinaryIO]:
    """Open a photo's file, or its bytes, for reading; `name` is for messages. Raises PhotoError."""
    if isinstance(source, bytes):
        yield BytesIO(source)
        return
    try:
        path = Path(source)
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its other end
            kind = "folder" if stat.S_ISDIR(mode) else "device or pipe"
            raise PhotoError(f"{name}: this is a {kind}, not a photo")
        stream = path.open("rb")
    except (OSError, ValueError) as error:
        raise PhotoError(f"{name}: {_why_not_opened(error)}") from error
    with stream:
        yield stream


def _why_not_opened(error: Exception) -> str:
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return "there is no such file"
        case PermissionError():
            return "you are not allowed to read it"
        case OSError(strerror=str(reason)):
            return f"it cannot be read ({reason})"
    return "this is not a possible file name"


def _open_image(stream: BinaryIO, name: str) -> "ImageFile":
    """Read the header of an image file.

    The format's class is called instead of `PIL.Image.open`, which refuses images over a limit of the process
    that could only be lifted for all threads at once.
    """
    try:
        header = stream.read(_HEADER_BYTES)
        stream.seek(0)
    except OSError as error:
        raise PhotoError(f"{name}: {_why_not_opened(error)}") from error
    if not header:
        raise PhotoError(f"{name}: the file is empty")
    opener = _image_class(header)
    if opener is None:
        raise PhotoKindError(f"{name}: this is not an image of a kind that can be read ({_KINDS})")
    try:
        with _quietly():
            return opener(stream)
    except Exception as error:  # a damaged file can make a parser raise anything
        if opener.__name__ == "TiffImageFile":
            raise _UnknownLayout from error
        raise PhotoError(f"{name}: {_why_not_decoded(error)}") from error


def _image_class(header: bytes) -> "type[ImageFile] | None":
    """Return Pillow's class for the format that a file's first bytes announce."""
    from PIL.AvifImagePlugin import AvifImageFile
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.GifImagePlugin import GifImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.TiffImagePlugin import TiffImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    if header.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if header.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if header.startswith(b"RIFF") and header[8:12] == b"WEBP":
        return WebPImageFile
    if header.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return TiffImageFile
    if header.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile
    if header.startswith(b"BM"):
        return BmpImageFile
    if header[4:8] == b"ftyp":
        end = min(int.from_bytes(header[:4], "big"), len(header))
        brands = {header[8:12], *(header[at : at + 4] for at in range(16, end, 4))}
        if brands & {b"avif", b"avis"}:
            return AvifImageFile
        if brands & _HEIC_BRANDS:
            from pillow_heif import HeifImageFile

            return HeifImageFile
    return None


def _check_size(size: tuple[int, int], name: str, limits: PhotoLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise PhotoError(f"{name}: the image has no pixels")
    if width * height > limits.max_pixels:
        raise PhotoSizeError(
            f"{name}: the image has {width} x {height} = {width * height:,} pixels, "
            f"more than the limit of {limits.max_pixels:,}"
        )


# --- decoding ----------------------------------------------------------------------------------------------


def _why_not_decoded(error: Exception) -> str:
    from PIL import Image

    if isinstance(error, MemoryError):
        return "there is not enough memory to decode the image"
    if isinstance(error, Image.DecompressionBombError):
        return "the image has more pixels than its decoder accepts"
    return "the image is damaged or cut short and cannot be decoded"


def _read_image(image: "Image.Image", name: str) -> Pixels:
    """Decode an image whose header has been read and checked."""
    try:
        # Only TIFF files have their metadata parsed while they are decoded.
        with _quietly() if image.format == "TIFF" else nullcontext():
            image.load()
        return _upright(_rgb(image, name), _orientation(image))
    except PhotoError:
        raise
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, EOFError, struct.error
        raise PhotoError(f"{name}: {_why_not_decoded(error)}") from error


def _orientation(image: "Image.Image") -> int:
    """Return the EXIF orientation; 1, upright, when there is none or it cannot be read.

    To be called after decoding: a PNG file may have its EXIF tags last, and Pillow turns TIFF images by
    itself and then deletes the tag.
    """
    try:
        with _quietly():
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # metadata may hold anything, and Pillow's parser raises accordingly
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.require(pixels, requirements=["C", "W"])


def _rgb(image: "Image.Image", name: str) -> Pixels:
    """Return a decoded image of any mode as uint8[H, W, 3]."""
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image)
        if getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE_TAG) == (12,):
            grey = grey << 4
        return _colour(_eight_bits(grey, name), name)
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    try:
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise PhotoError(f"{name}: images of colour mode {image.mode} cannot be read") from error


def _eight_bits(values: npt.NDArray[Any], name: str) -> Pixels:
    """Scale pixel values to 8 bits: 16-bit ones keep their upper byte, as Pillow does with 16-bit colours."""
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.asarray(np.rint(values * 255), np.uint8)
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return np.asarray(values >> 8, np.uint8)
    raise PhotoError(f"{name}: its pixel values, {low} to {high}, are neither 16-bit nor fractions of 1")


def _colour(pixels: Pixels, name: str) -> Pixels:
    """Return uint8[H, W], [H, W, 3] or [H, W, 4] as RGB."""
    from PIL import Image

    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return _on_white(Image.fromarray(pixels))
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return pixels
    raise PhotoError(f"{name}: pixels must have shape (H, W, 3), (H, W) or (H, W, 4); got {pixels.shape}")


def _on_white(rgba: "Image.Image") -> Pixels:
    """Lay an RGBA image on white paper."""
    from PIL import Image

    paper = Image.new("RGB", rgba.size, "white")
    paper.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(paper)


def _read_unusual_tiff(stream: BinaryIO, name: str, limits: PhotoLimits) -> Pixels:
    """Decode a TIFF file of a layout that Pillow lacks, such as RGB in 32-bit floats, with OpenCV.

    OpenCV cannot read a header alone, so the size comes from the file's first directory. OpenCV turns the
    image upright by itself.
    """
    import cv2
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    try:
        stream.seek(0)
        head = stream.read(16)
        directory = ImageFileDirectory_v2(head if b"+" in head[2:4] else head[:8])  # "+" marks a BigTIFF file
        with _quietly():
            stream.seek(directory.next)
            directory.load(stream)
        size = int(directory[_WIDTH_TAG]), int(directory[_HEIGHT_TAG])
        _check_size(size, name, limits)
        stream.seek(0)
        pixels = cv2.imdecode(np.frombuffer(stream.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise ValueError("OpenCV cannot decode it")
        if pixels.ndim == 3:
            pixels = pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]  # from BGR
        return np.require(_colour(_eight_bits(pixels, name), name), requirements=["C", "W"])
    except PhotoError:
        raise
    except Exception as error:  # a damaged file can make a parser raise anything
        raise PhotoError(f"{name}: {_why_not_decoded(error)}") from error


def _degrees(reference: str | bytes, parts: Sequence[SupportsFloat], letters: str, limit: int) -> float:
    """Return degrees, minutes and seconds as signed degrees; raises when they make no sense."""
    letter = reference.decode() if isinstance(reference, bytes) else reference
    sign = {letters[0]: 1, letters[1]: -1}[letter.strip("\0 ").upper()]
    degrees = sum((float(part) / 60**power for power, part in enumerate(parts)), 0.0)
    if not 0 <= degrees <= limit:
        raise ValueError(f"{degrees} degrees are outside [0, {limit}]")
    return sign * degrees
