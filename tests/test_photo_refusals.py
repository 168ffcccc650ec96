"""Photos that cannot be read, or only in part: one sentence each, and no harm done."""

import os
import struct
import sys
import threading
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_photos import ORIENTATION, encoded, exif_with, scene, tiff
from PIL import Image

from geoengine.engine.errors import PhotoError
from geoengine.engine.photos import PhotoLimits, read_gps, read_photo


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(PhotoError, match=r"nowhere\.jpg: there is no such file"):
        read_photo(tmp_path / "nowhere.jpg")
    with pytest.raises(PhotoError, match=f"{tmp_path.name}: this is a folder, not a photo"):
        read_photo(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PhotoError, match="pipe: this is a device or pipe, not a photo"):
        read_photo(tmp_path / "pipe")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(PhotoError, match=r"empty\.jpg: the file is empty"):
        read_photo(tmp_path / "empty.jpg")
    with pytest.raises(PhotoError, match=r"empty\.jpg/a: there is no such file"):
        read_photo(tmp_path / "empty.jpg" / "a")
    with pytest.raises(PhotoError, match="this is not a possible file name"):
        read_photo("a\0b")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(PhotoError, match=r"empty\.jpg: you are not allowed to read it"):
        read_photo(tmp_path / "empty.jpg")


@pytest.mark.parametrize(
    "data",
    [
        b"not an image at all",
        b"<html></html>",
        b"%PDF-1.7",
        b"\0" * 500,
        b"\0\0\0\x18ftypisom\0\0\0\0isommp42",
    ],
)
def test_files_that_are_not_images(data):
    with pytest.raises(
        PhotoError, match=r"x\.jpg: this is not an image of a kind that can be read \(JPEG, PNG"
    ):
        read_photo(data, name="x.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "GIF", "BMP"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.95])
def test_truncated_files(kind, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    cut = data[: max(16, int(len(data) * part))]
    with pytest.raises(PhotoError, match=r"x\.jpg: the image is damaged or cut short and cannot be decoded"):
        read_photo(cut, name="x.jpg")


def huge(kind):
    """A file that says it is 20000 x 10000, and has no pixels at all."""
    tiny = encoded(np.zeros((2, 3, 3), np.uint8), kind)
    if kind == "PNG":
        size = b"IHDR" + struct.pack(">II", 20000, 10000) + tiny[24:29]
        return tiny[:12] + size + struct.pack(">I", zlib.crc32(size)) + struct.pack(">I", 10**6) + b"IDAT"
    if kind == "JPEG":
        at = tiny.index(b"\xff\xc0") + 5
        return tiny[:at] + struct.pack(">HH", 10000, 20000) + tiny[at + 4 :]
    if kind == "GIF":
        return tiny[:6] + struct.pack("<HH", 20000, 10000) + tiny[10:]
    return tiny[:18] + struct.pack("<ii", 20000, 10000) + tiny[26:]  # BMP


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
def test_too_many_pixels_are_refused_before_decoding(kind):
    message = "x: the image has 20000 x 10000 = 200,000,000 pixels, more than the limit of 100,000,000"
    with pytest.raises(PhotoError, match=message):
        read_photo(huge(kind), name="x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "GIF", "BMP"])
def test_the_limit_is_inclusive(kind):
    data = encoded(scene(40, 50), kind)
    assert read_photo(data, limits=PhotoLimits(max_pixels=2000)).pixels.shape == (40, 50, 3)
    with pytest.raises(PhotoError, match="50 x 40 = 2,000 pixels, more than the limit of 1,999"):
        read_photo(data, limits=PhotoLimits(max_pixels=1999))


def test_the_limit_holds_for_every_source():
    limits = PhotoLimits(max_pixels=1)
    unusual = cv2.imencode(".tiff", np.zeros((4, 5, 3), np.float32))[1].tobytes()
    for source in (scene(4, 5), Image.fromarray(scene(4, 5)), unusual):
        with pytest.raises(PhotoError, match="5 x 4 = 20 pixels, more than the limit of 1"):
            read_photo(source, limits=limits)
    with pytest.raises(PhotoError, match="the pixel limit must be at least 1; got 0"):
        PhotoLimits(max_pixels=0)


def test_pillows_own_limit_is_untouched_and_does_not_apply(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for kind in ("JPEG", "PNG", "AVIF", "HEIF", "GIF", "BMP"):
        assert read_photo(encoded(scene(), kind)).pixels.shape == (48, 80, 3)
    for kind in ("WEBP", "TIFF"):  # their classes look at Pillow's limit themselves
        with pytest.raises(PhotoError, match="the image has more pixels than its decoder accepts"):
            read_photo(encoded(scene(), kind))
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((4, 4, 3), np.float32),
            r"the array: pixels must be uint8\[H, W, 3\]; got float32 \(4, 4, 3\)",
        ),
        (np.zeros((4,), np.uint8), r"pixels must be uint8\[H, W, 3\]; got uint8 \(4,\)"),
        (np.zeros((4, 4, 2), np.uint8), r"pixels must have shape \(H, W, 3\), .*; got \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), "the image has no pixels"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(PhotoError, match=message):
        read_photo(array)


@pytest.mark.parametrize(
    ("values", "bits", "sample_format", "said"),
    [
        (np.full((4, 4), -3.5, np.float32), 32, 3, r"-3\.5 to -3\.5"),
        (np.full((4, 4), 2.5, np.float32), 32, 3, r"2\.5 to 2\.5"),
        (np.full((4, 4), np.nan, np.float32), 32, 3, "nan to nan"),
        (np.full((4, 4), 70000, np.uint32), 32, 1, "70000 to 70000"),
        (np.full((4, 4), -2, np.int32), 32, 2, "-2 to -2"),
    ],
)
def test_pixel_values_that_are_no_photo_are_refused(values, bits, sample_format, said):
    message = f"x: its pixel values, {said}, are neither 16-bit nor fractions of 1"
    with pytest.raises(PhotoError, match=message):
        read_photo(tiff(values.tobytes(), 4, bits, (339, 3, sample_format)), name="x")


def test_random_damage_ends_in_pixels_or_one_sentence():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "GIF", "BMP"):
        whole = np.frombuffer(
            encoded(scene(16, 24), kind, exif=exif_with(ORIENTATION, 6).tobytes()), np.uint8
        )
        for _ in range(60):
            damaged = whole.copy()
            where = rng.integers(0, len(whole), 8)
            damaged[where] = rng.integers(0, 256, 8)
            try:
                photo = read_photo(damaged.tobytes(), name="x", limits=PhotoLimits(max_pixels=10**6))
            except PhotoError as error:
                assert str(error).startswith("x: ")
                assert "\n" not in str(error)
            else:
                assert photo.pixels.ndim == 3
            with suppress(PhotoError):
                read_gps(damaged.tobytes())


def test_threads_do_not_disturb_each_other_or_the_warning_filters():
    before, interval = list(warnings.filters), sys.getswitchinterval()
    data = [encoded(scene(), "JPEG", quality=95, subsampling=0), encoded(scene(), "TIFF")]
    wrong = []

    def read():
        for source in data * 20:
            if np.abs(read_photo(source).pixels.astype(int) - scene()).max() > 6:
                wrong.append(source)

    threads = [threading.Thread(target=read) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong
    assert list(warnings.filters) == before
