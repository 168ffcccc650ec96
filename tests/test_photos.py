"""Reading photos: every kind that phones and cameras write, upright; GPS tags; folders."""

import struct

import cv2
import numpy as np
import pytest
from made_photos import GPS, MODEL, ORIENTATION, assert_close, encoded, exif_with, scene, tiff
from PIL import Image, ImageOps

from geoengine.engine.errors import PhotoError
from geoengine.engine.photos import expand_photo_paths, read_gps, read_photo

# --- kinds of files and of pixels --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}, 6),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 6),
        ("PNG", {}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("WEBP", {"lossless": True}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "tiff_deflate"}, 0),
        ("TIFF", {"big_tiff": True}, 0),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}, 12),
        ("HEIF", {"quality": 95, "chroma": 444}, 12),
        ("BMP", {}, 0),
    ],
)
def test_kinds_of_files(tmp_path, kind, options, tolerance):
    data = encoded(scene(), kind, **options)
    path = tmp_path / "photo.bin"  # the kind is found from the bytes
    path.write_bytes(data)
    for source in (path, str(path), data):
        assert_close(read_photo(source).pixels, scene(), tolerance)


def test_grey_pixels():
    grey = scene()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF", "BMP"):
        assert_close(read_photo(encoded(grey, kind)).pixels, expected)
    assert_close(read_photo(encoded(grey, "JPEG", quality=95)).pixels, expected, 3)


def test_one_bit_pixels():
    image = Image.fromarray(scene()).convert("1")
    for kind in ("PNG", "TIFF"):
        assert_close(read_photo(encoded(image, kind)).pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_scaled_not_clipped(kind, channels):
    wide = scene().astype(np.uint16) * 257
    if channels == 1:
        wide = wide[..., 0]
        expected = np.repeat(scene()[..., :1], 3, axis=2)
    else:
        expected = scene()
        wide = cv2.cvtColor(wide, cv2.COLOR_RGB2BGR if channels == 3 else cv2.COLOR_RGB2BGRA)
    data = cv2.imencode(kind, wide)[1].tobytes()
    assert_close(read_photo(data).pixels, expected)


def test_twelve_bits_are_scaled_too():
    twelve = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    pairs = twelve.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    expected = np.repeat((twelve >> 4).astype(np.uint8)[..., None], 3, axis=2)
    assert_close(read_photo(tiff(packed, 16, 12)).pixels, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_tiffs_of_fractions(channels):
    fractions = ((scene() + 0.4) / 255).astype(np.float32)
    fractions = np.ascontiguousarray(fractions[..., 0] if channels == 1 else fractions[..., ::-1])
    expected = np.repeat(scene()[..., :1], 3, axis=2) if channels == 1 else scene()
    assert_close(read_photo(cv2.imencode(".tiff", fractions)[1].tobytes()).pixels, expected)
    fractions += np.float32(0.2 / 255)  # now nearer to the next value
    assert_close(read_photo(cv2.imencode(".tiff", fractions)[1].tobytes()).pixels, expected + 1)


@pytest.mark.parametrize("big", [False, True])
def test_tiffs_that_pillow_does_not_know(big):
    fractions = np.linspace(0, 1, 256).reshape(16, 16)
    expected = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    sample_format = (339, 3, 3)  # IEEE floats, here of 64 bits
    assert_close(read_photo(tiff(fractions.tobytes(), 16, 64, sample_format, big=big)).pixels, expected)


def test_cmyk_pixels():
    image = Image.fromarray(scene()).convert("CMYK")
    assert_close(read_photo(encoded(image, "TIFF")).pixels, scene(), 1)
    jpeg = encoded(image, "JPEG", quality=95)
    assert b"Adobe" in jpeg  # with that marker, 255 means no ink
    assert_close(read_photo(jpeg).pixels, scene(), 8)


def test_palette_pixels():
    image = Image.fromarray(scene()).quantize(64)
    for kind in ("PNG", "GIF", "TIFF", "BMP"):
        assert_close(read_photo(encoded(image, kind)).pixels, np.asarray(image.convert("RGB")))


def test_transparency_becomes_white():
    alpha = np.zeros(scene().shape[:2], np.uint8)
    alpha[:, 20:40], alpha[:, 40:] = 128, 255
    rgba = np.dstack([scene(), alpha])
    weight = alpha[..., None] / 255
    expected = np.rint(scene() * weight + 255 * (1 - weight)).astype(np.uint8)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        pixels = read_photo(encoded(rgba, kind, **options)).pixels
        assert (pixels[:, :20] == 255).all()
        assert_close(pixels, expected, 1)
    assert_close(read_photo(rgba).pixels, expected, 1)
    grey = Image.merge("LA", [Image.fromarray(scene()[..., 0]), Image.fromarray(alpha)])
    assert_close(read_photo(encoded(grey, "PNG")).pixels[..., 1], expected[..., 0], 1)


def test_transparent_colour_of_a_palette_becomes_white():
    indices = np.zeros((4, 6), np.uint8)
    indices[:, 3:] = 1
    image = Image.fromarray(indices).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    expected = np.zeros((4, 6, 3), np.uint8)
    expected[:, :3], expected[:, 3:] = 255, (0, 0, 255)
    for kind, transparency in (("PNG", 0), ("PNG", b"\x00\xff"), ("GIF", 0)):
        assert_close(read_photo(encoded(image, kind, transparency=transparency)).pixels, expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_read(kind):
    first, second = (Image.new("RGB", (32, 24), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert_close(read_photo(data).pixels, np.asarray(first), 3)


def test_one_pixel():
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "GIF", "BMP"):
        assert read_photo(encoded(np.full((1, 1, 3), 128, np.uint8), kind)).pixels.shape == (1, 1, 3)


# --- orientation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_orientations_are_applied(kind, orientation):
    image = Image.fromarray(scene())
    lying = image if orientation == 1 else image.transpose(_UNDO[orientation])
    data = encoded(lying, kind, quality=95, exif=exif_with(ORIENTATION, orientation).tobytes())
    assert_close(read_photo(data).pixels, scene(), 40)  # colours at the corners differ by 150 and more
    lying.getexif()[ORIENTATION] = orientation
    assert_close(read_photo(lying).pixels, np.asarray(ImageOps.exif_transpose(lying)))
    assert_close(read_photo(lying).pixels, scene())


_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation):
    data = encoded(scene(), "PNG", exif=exif_with(ORIENTATION, orientation))
    assert_close(read_photo(data).pixels, scene())


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\0\0\xff\xff\0\0",
        b"Exif\0\0",
    ],
)
def test_damaged_exif_neither_warns_nor_breaks(exif):
    data = encoded(scene(), "JPEG", quality=95, subsampling=0, exif=exif)
    assert_close(read_photo(data).pixels, scene(), 6)
    assert read_gps(data) is None


def test_a_damaged_exif_directory_of_a_tiff_neither_warns_nor_breaks():
    exif_directory = (34665, 4, 10**6)  # far beyond the end of the file
    assert read_photo(tiff(bytes(256), 16, 8, exif_directory)).pixels.shape == (16, 16, 3)


def test_an_orientation_that_is_text_is_ignored():
    text = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", ORIENTATION, 2, 4, b"abc\0") + bytes(4)
    assert_close(read_photo(encoded(scene(), "PNG", exif=text)).pixels, scene())


# --- other sources -----------------------------------------------------------------------------------------


def test_arrays_are_taken_as_they_are():
    assert_close(read_photo(scene()).pixels, scene())
    assert_close(read_photo(scene()[..., 1]).pixels, np.repeat(scene()[..., 1:2], 3, axis=2))
    pixels = scene()
    photo = read_photo(pixels, name="mine")
    pixels[:] = 0
    assert photo.name == "mine"
    assert_close(photo.pixels, scene())


def test_names(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(scene(), "PNG"))
    assert read_photo(path).name == str(path)
    assert read_photo(path, name="a").name == "a"
    assert read_photo(path.read_bytes()).name == "the photo"


def test_pixels_are_contiguous_and_writable():
    for source in (encoded(scene(), "PNG"), encoded(scene(), "PNG", exif=exif_with(ORIENTATION, 6)), scene()):
        pixels = read_photo(source).pixels
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable


# --- GPS tags ----------------------------------------------------------------------------------------------


def with_gps(gps, kind="JPEG"):
    exif = exif_with(MODEL, "a camera")
    exif.get_ifd(GPS).update(gps)
    return encoded(scene(), kind, exif=exif.tobytes())


WHITNEY = {1: "N", 2: (36.0, 34.0, 42.9), 3: "W", 4: (118.0, 17.0, 31.2)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_gps_tags_are_read(tmp_path, kind):
    path = tmp_path / "photo"
    path.write_bytes(with_gps(WHITNEY, kind))
    lng, lat = read_gps(path)
    assert lat == pytest.approx(36.57858, abs=1e-5)
    assert lng == pytest.approx(-118.29200, abs=1e-5)


@pytest.mark.parametrize(
    "gps",
    [
        {},
        {1: "N", 2: (36.0, 34.0, 42.9)},
        WHITNEY | {1: "X"},
        WHITNEY | {1: ""},
        WHITNEY | {2: (91.0, 0.0, 0.0)},
        WHITNEY | {4: (181.0, 0.0, 0.0)},
        {1: "N", 2: (0.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)},
    ],
)
def test_gps_tags_that_make_no_sense_are_none(gps):
    assert read_gps(with_gps(gps)) is None


def test_gps_tags_with_zero_denominators_are_none():
    data = with_gps(WHITNEY)
    degrees = struct.pack(">II", 36, 1)
    assert degrees in data
    assert read_gps(data.replace(degrees, struct.pack(">II", 36, 0))) is None


def test_gps_of_a_file_that_is_no_photo(tmp_path):
    with pytest.raises(PhotoError, match="there is no such file"):
        read_gps(tmp_path / "nowhere.jpg")
    with pytest.raises(PhotoError, match="this is not an image"):
        read_gps(b"text")


# --- folders -----------------------------------------------------------------------------------------------


def test_folders_become_their_images(tmp_path):
    images = ["b.JPG", "a.heic", "d.tiff", *(f"e{i}.png" for i in range(30, 10, -1))]
    for name in (*images, "c.txt", ".hidden.jpg", "odd.data"):
        (tmp_path / name).touch()
    (tmp_path / "deeper.jpg").mkdir()
    given = [str(tmp_path / "odd.data"), tmp_path]
    assert expand_photo_paths(given) == [tmp_path / name for name in ("odd.data", *sorted(images))]


def test_folders_and_paths_that_hold_no_photo(tmp_path):
    with pytest.raises(PhotoError, match=f"{tmp_path.name}: the folder has no images"):
        expand_photo_paths([tmp_path])
    with pytest.raises(PhotoError, match=r"nowhere\.jpg: there is no such file"):
        expand_photo_paths([tmp_path / "nowhere.jpg"])
