"""Where tile pictures come from: the seam that every tile source implements, and what opens one."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from geoengine.engine.tiles import MAX_LATITUDE_DEG, LngLatBbox

WORLD_BOUNDS = LngLatBbox(-180.0, -MAX_LATITUDE_DEG, 180.0, MAX_LATITUDE_DEG)
"""The whole map."""

_WHAT_A_SOURCE_IS = (
    "a tile source is a URL template such as https://host/{z}/{x}/{y}.png, "
    "an .mbtiles or .pmtiles file, a folder of z/x/y.png tiles, or the word planet"
)


@dataclass(frozen=True, slots=True, eq=False)
class TileBatch:
    """Some of the tiles that were asked for, as they arrived.

    `positions` is int64[m], distinct row numbers of the request, in any order; `pixels` is uint8[m, S, S, 3]
    in RGB order.
    """

    positions: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.uint8]


class TileSource(Protocol):
    """Something that gives tile pictures."""

    @property
    def name(self) -> str:
        """What users see as the source's name; never holds a key."""

    @property
    def world(self) -> str:
        """The world that the tiles show: "earth" or "planet"."""

    @property
    def attribution(self) -> str:
        """Whom the pictures must be credited to; "" when that is unknown or nobody."""

    @property
    def tile_size(self) -> int:
        """Side of the tiles in pixels."""

    @property
    def min_zoom(self) -> int:
        """The coarsest zoom that the source may have tiles of."""

    @property
    def max_zoom(self) -> int:
        """The finest zoom that the source may have tiles of."""

    @property
    def bounds(self) -> LngLatBbox:
        """The box in degrees outside of which the source has no tiles."""

    @property
    def identity(self) -> str:
        """A hash, in hex, of what the pictures are: equal for the same pictures, whatever the source's name.

        Holds no key, and none goes into it.
        """

    @property
    def storable(self) -> bool:
        """Whether pictures, and what is computed from them, may be kept; False where the terms forbid it."""

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles `xy`, int64[n, 2] of (x, y), of zoom z in chunks, as they arrive, in any order.

        A tile that does not exist is in no chunk, every other tile is in exactly one. All chunks of a call
        have one tile side S. Threads may read at the same time. Closing the iterator starts no further
        requests and waits for none. Raises TileError for a tile that cannot exist, SourceError when the
        source does not answer.
        """

    def close(self) -> None:
        """Let go of files and connections; closing twice is allowed, reading after it is not."""


def fingerprint(*parts: str | bytes) -> str:
    """Return the SHA-256, in hex, of parts that together say what a source's pictures are."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def open_source(spec: str) -> TileSource:
    """Open the tile source `spec`.

    That is "planet", a URL template, a URL of a .pmtiles file, an .mbtiles or .pmtiles file, a folder, a
    .toml file that describes sources, or the name of a preset. Raises SourceError when it is none of these or
    cannot be opened.
    """
    if spec == "planet":
        from geoengine.engine.sources.planet import PlanetSource

        return PlanetSource()
    from geoengine.engine.sources.opening import open_parts, parts_of

    return open_parts(parts_of(spec))
