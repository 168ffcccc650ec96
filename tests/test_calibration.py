"""The pictures from which int8 takes its ranges."""

import numpy as np
import pytest
from PIL import Image

from geoengine.engine.errors import ExportError, PhotoError
from geoengine.export.calibration import FEWEST, MOST, calibration_pictures
from geoengine.export.reference import check_pictures


def test_without_a_folder_they_are_drawn():
    pictures = calibration_pictures(None, 32)
    assert pictures.dtype == np.uint8
    assert pictures.shape[1:] == (32, 32, 3)
    assert 100 <= len(pictures) <= 200
    np.testing.assert_array_equal(pictures, calibration_pictures(None, 32))
    assert len(np.unique(pictures, axis=0)) > 0.9 * len(pictures)
    assert {0, 255} <= {int(picture.min()) for picture in pictures if picture.min() == picture.max()}


def test_none_is_one_that_the_build_is_judged_by():
    drawn = {picture.tobytes() for picture in calibration_pictures(None, 32)}
    assert not drawn & {picture.tobytes() for picture in check_pictures(32)}


def write(folder, count):
    for number in range(count):
        value = np.full((20, 40, 3), number, np.uint8)
        Image.fromarray(value).save(folder / f"{number:03d}.png")
    return folder


def test_own_pictures_take_the_place_of_the_planet(tmp_path):
    pictures = calibration_pictures(write(tmp_path, FEWEST), 16)
    drawn = calibration_pictures(None, 16)
    assert [int(picture[0, 0, 0]) for picture in pictures[:FEWEST]] == list(range(FEWEST))
    others = len(pictures) - FEWEST
    np.testing.assert_array_equal(pictures[FEWEST:], drawn[-others:])
    assert 8 < others < len(drawn)


def test_of_many_pictures_some_are_taken_evenly(tmp_path):
    pictures = calibration_pictures(write(tmp_path, MOST + 60), 16)
    values = [int(picture[0, 0, 0]) for picture in pictures[:MOST]]
    assert (values[0], values[-1]) == (0, MOST + 59)
    assert set(np.diff(values)) == {1, 2}


def test_too_few_pictures(tmp_path):
    with pytest.raises(ExportError, match=f"holds 3 pictures, and calibration needs at least {FEWEST}"):
        calibration_pictures(write(tmp_path, 3), 16)


def test_pictures_that_cannot_be_read(tmp_path):
    with pytest.raises(PhotoError, match="no images"):
        calibration_pictures(tmp_path, 16)
    write(tmp_path, FEWEST)
    (tmp_path / "zz.png").write_bytes(b"not a picture")
    with pytest.raises(PhotoError, match=r"zz\.png"):
        calibration_pictures(tmp_path, 16)
