"""A search of the planet whose tiles' trunk tokens are kept on disk: one set of tokens for many map encoders.

Drawing a tile and running the trunk on it take most of a search's time, and neither depends on the map
encoders. Here the search is the engine's own; only its pictures are addresses, which the encoder turns into
tokens that it has, or computes once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends.batches import HostRows
from geoengine.engine.manifest import encoder_name
from geoengine.engine.sources import TileBatch
from geoengine.engine.sources.planet import PlanetSource
from geoengine.training.features import TileFeatures
from geoengine.training.negatives import Keys, tile_keys
from geoengine.training.towers import Head
from geoengine.training.validation import embed_tiles


class Addresses(PlanetSource):
    """The planet, each tile a picture of 2 x 2 pixels that holds its column and row."""

    def read(self, z: int, xy: NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield all tiles `xy`, int64[n, 2], at once."""
        address = np.zeros((len(xy), 3), np.int32)
        address[:, :2] = xy
        yield TileBatch(np.arange(len(xy)), address.view(np.uint8).reshape(-1, 2, 2, 3))


class KeptEncoders:
    """Map encoders by zoom, over tokens of `tiles`; no tile is encoded twice, whatever the searches."""

    batch = 4096

    def __init__(self, heads: Mapping[int, Head], tiles: TileFeatures) -> None:
        self._heads, self._tiles = heads, tiles
        self._known: dict[int, tuple[Keys, NDArray[np.float32]]] = {}

    def encode(self, encoder: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the unit embeddings, float32[n, d], of the tiles whose addresses the pictures hold."""
        [zoom] = [zoom for zoom in self._heads if encoder_name(zoom) == encoder]
        address = np.ascontiguousarray(pixels).reshape(len(pixels), 12).view(np.int32)
        keys = tile_keys(address[:, :2].astype(np.int64))
        head = self._heads[zoom]
        known, rows = self._known.get(zoom, (keys[:0], np.empty((0, head.proj.shape[1]), np.float32)))
        new = np.setdiff1d(keys, known)
        if len(new):
            self._tiles.prepare(zoom, new)
            made = embed_tiles(head, self._tiles, zoom, new, "fp32").numpy()
            known, rows = np.concatenate([known, new]), np.concatenate([rows, made])
            order = np.argsort(known)
            known, rows = known[order], rows[order]
            self._known[zoom] = known, rows
        return np.asarray(rows[np.searchsorted(known, keys)])

    def rows(self, encoder: str, capacity: int) -> HostRows:
        """Return room for the embeddings of `capacity` tiles of one encoder."""
        return HostRows(self.encode, encoder, capacity)
