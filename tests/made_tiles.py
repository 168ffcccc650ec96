"""Tiles whose colour says which they are, and a check of what every tile source promises."""

import io

import numpy as np
from PIL import Image

from geoengine.engine.sources.streaming import CHUNK
from geoengine.engine.tiles import all_xy


def colour_of(z, x, y):
    return (40 * z % 256, 7 * x % 256, 11 * y % 256)


def picture(colour, kind="PNG", size=256, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, kind, **options)
    return buffer.getvalue()


def tile_picture(z, x, y, **options):
    return picture(colour_of(z, x, y), **options)


def read_all(source, z, xy, *, tolerance=0):
    """Read tiles, check what every source promises, and return the positions that arrived."""
    xy = np.asarray(xy, np.int64).reshape(-1, 2)
    seen = []
    for batch in source.read(z, xy):
        assert batch.positions.dtype == np.int64
        assert batch.pixels.dtype == np.uint8
        assert 0 < len(batch.positions) <= CHUNK
        assert batch.pixels.shape == (len(batch.positions), source.tile_size, source.tile_size, 3)
        for position, pixels in zip(batch.positions, batch.pixels, strict=True):
            expected = np.array(colour_of(z, *xy[position].tolist()))
            assert np.abs(pixels.astype(int) - expected).max() <= tolerance
        seen += batch.positions.tolist()
    assert len(seen) == len(set(seen))
    return sorted(seen)


def check_small_world(source, name):
    """Check an archive of all tiles of zooms 3 and 4, 32 px each: every tile once, and in its place."""
    assert (source.name, source.world, source.attribution, source.tile_size) == (name, "earth", "", 32)
    assert read_all(source, 4, all_xy(4)) == list(range(256))
    assert read_all(source, 3, [(7, 0), (0, 7), (3, 4)]) == [0, 1, 2]
    assert read_all(source, 3, []) == []
