"""A folder of photos for bulk runs, one of which is none, and what such a run writes."""

import json
import os

import numpy as np
from made_photos import encoded

PHOTOS, BROKEN = 10, 4  # the fifth in the folder cannot be read
ALL_BUT_ONE = [f"{number}.png" for number in range(PHOTOS) if number != BROKEN]


def write_photos(folder):
    """Make the folder; returns it."""
    folder.mkdir()
    for number in range(PHOTOS):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        (folder / f"{number}.png").write_bytes(b"no photo" if number == BROKEN else encoded(pixels, "PNG"))
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(path):
    return [os.path.basename(record["photo"]) for record in lines(path)]
