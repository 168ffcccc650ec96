"""Engines that know where made photos were taken, or lose it: the oracle behind the backend's seam."""

import numpy as np
from fakes import AddressTiles, Oracle

from geoengine.bench.truth import TruthPhoto
from geoengine.engine.backends.batches import HostRows
from geoengine.engine.errors import PhotoError
from geoengine.engine.photos import Photo


class OracleBackend:
    """Encodes photos whose first pixels are their place; from `lost_at` on it knows nothing."""

    name, variant, batch = "oracle", "exact", 32

    def __init__(self, lost_at=99):
        self.oracle, self.lost_at, self.closed = Oracle(), lost_at, False

    def encode(self, encoder, pixels):
        if encoder == "photo":
            places = np.ascontiguousarray(pixels).reshape(len(pixels), -1)[:, :16].copy().view(np.float64)
            return self.oracle.photos(places[:, 0], places[:, 1])
        if int(encoder[1:]) >= self.lost_at:
            return np.tile(np.eye(1, 28, dtype=np.float32), (len(pixels), 1))  # all tiles are alike
        return self.oracle.encode(encoder, pixels)

    def rows(self, encoder, capacity):
        return HostRows(self.encode, encoder, capacity)

    def close(self):
        self.closed = True


class PlanetAddresses(AddressTiles):
    name, world = "planet", "planet"


def picture_of(place):
    """Pixels, uint8[8, 8, 3], that begin with a place."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels.reshape(-1)[:16] = np.array([place.lng, place.lat]).view(np.uint8)
    return pixels


class MadePhotos:
    """A truth set of places; photos whose keys are in `broken` cannot be read."""

    def __init__(self, places, *, world="planet", broken=(), name="made"):
        self.places, self.broken = list(places), set(broken)
        self.name, self.title, self.world = name, f"the {name} photos", world
        self.identity, self.wanted = f"identity of {name}", None
        self.read = []

    def __iter__(self):
        for number, place in enumerate(self.places):
            yield TruthPhoto(f"photo {number}", place, lambda n=number, p=place: self._read(n, p))

    def _read(self, number, place):
        self.read.append(number)
        if number in self.broken:
            raise PhotoError(f"photo {number}: is\nbroken")
        return Photo(f"photo {number}", picture_of(place))

    def remarks(self):
        return ["made for a test"]
