"""A tile source and an encoder that know nothing but addresses."""

import numpy as np

from geoengine.engine.backends.batches import HostRows
from geoengine.engine.sources import WORLD_BOUNDS, TileBatch
from geoengine.engine.tiles import LEVELS, MAX_LATITUDE_DEG


class AddressTiles:
    """Tiles of 2 x 2 pixels that hold their own (z, x, y); records what is read."""

    name, world, attribution, tile_size = "addresses", "earth", "", 2
    min_zoom, max_zoom, bounds, identity, storable = 0, 30, WORLD_BOUNDS, "addresses", True

    def __init__(self, *, missing=None, shuffle=None, chunk=50, ocean=None):
        self.missing = missing or (lambda z, x, y: np.zeros(len(x), dtype=bool))
        self.ocean = ocean or (lambda z, x, y: np.zeros(len(x), dtype=bool))
        self.shuffle, self.chunk = shuffle, chunk
        self.reads = []

    def read(self, z, xy):
        self.reads.append((z, [tuple(row) for row in xy.tolist()]))
        order = np.flatnonzero(~self.missing(z, xy[:, 0], xy[:, 1]))
        if self.shuffle is not None:
            np.random.default_rng(self.shuffle).shuffle(order)
        for start in range(0, len(order), self.chunk):
            positions = order[start : start + self.chunk]
            address = np.column_stack([np.full(len(positions), z), xy[positions]]).astype(np.int32)
            address[self.ocean(z, address[:, 1], address[:, 2])] = (z, -1, -1)
            yield TileBatch(positions.astype(np.int64), address.view(np.uint8).reshape(-1, 2, 2, 3))

    def close(self):
        pass


def addresses(pixels):
    """(z, x, y) of each picture, int32[n, 3]."""
    return np.ascontiguousarray(pixels).reshape(len(pixels), 12).view(np.int32)


class HostEncoders:
    """The encoders of a search, made from a function (encoder, uint8[n, S, S, 3]) -> float32[n, d]."""

    def __init__(self, encode, batch=32):
        self.encode, self.batch = encode, batch

    def rows(self, encoder, capacity):
        return HostRows(self.encode, encoder, capacity)


class Oracle:
    """Embeddings made from coordinates, such that the true tile wins at each level.

    An embedding has four numbers per level: how far east and how far south a point is inside its tile of the
    level before (inside the world at the first level), each as a point on half a circle. A photo has all
    levels, a tile those down to its own, at its own centre's place. Of the tiles of a grid, the one with the
    point has the nearest centre on each axis, hence on each half circle, hence the largest cosine; and as a
    tile carries its ancestors, it does not tie with tiles of other parents.
    """

    def __init__(self, levels=LEVELS):
        self.levels = levels

    def parts(self, fractions, zoom):
        """Unit float32[n, levels * 4] for places on the map, float64[n, 2] in [0, 1]; 0 deeper than zoom."""
        parts = np.zeros((len(fractions), len(self.levels), 2, 2))
        for i, (level, coarser) in enumerate(zip(self.levels, (0, *self.levels), strict=False)):
            if level <= zoom:
                at = fractions
                if zoom <= 30:  # a tile: the centre of its ancestor, or its own
                    at = (np.floor(fractions * 2**level) + 0.5) / 2**level
                inside = at * 2**coarser - np.clip(np.floor(at * 2**coarser), 0, 2**coarser - 1)
                parts[:, i] = np.stack([np.cos(np.pi * inside), np.sin(np.pi * inside)], axis=-1)
        flat = parts.reshape(len(fractions), -1)
        return (flat / np.linalg.norm(flat, axis=1, keepdims=True)).astype(np.float32)

    def photos(self, lng, lat):
        phi = np.radians(np.clip(lat, -MAX_LATITUDE_DEG, MAX_LATITUDE_DEG))
        south = 0.5 - np.arcsinh(np.tan(phi)) / (2 * np.pi)
        return self.parts(np.column_stack([(np.asarray(lng) + 180) / 360, np.clip(south, 0, 1)]), 99)

    def encode(self, encoder, pixels):
        z, x, y = addresses(pixels).T
        assert set(z.tolist()) == {int(encoder[1:])}, "tiles of another level than the encoder's"
        return self.parts((np.column_stack([x, y]) + 0.5) / 2.0 ** int(z[0]), int(z[0]))
