"""What GeoCLIP says of map tiles: evidence for the search's path score."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import ONNXRUNTIME_CPU
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.geoclip.gallery import Gallery, cosines
from geoengine.engine.geoclip.locations import LocationEncoder
from geoengine.engine.index.known_rows import RowCache
from geoengine.engine.index.segments import HalfRows, Ids, tile_ids
from geoengine.engine.index.tile_index import Maker
from geoengine.engine.manifest import Variant, encoder_hash, model_name
from geoengine.engine.tiles import centers

MASS_ZOOM = 8
"""Up to this zoom a tile gets the gallery's share inside it: its centre would stand for nothing."""

CENTRE_ZOOM = 12
"""Up to this zoom a tile is scored at its centre. Deeper ones all get 0: the encoder's finest kernel reaches
15 km, so that the children of a tile hardly differ."""

FLOOR = 0.01
"""The part of the probability that is spread evenly over all tiles of a zoom: no tile is ruled out."""

_MOST_ROWS = 1 << 16  # centres of one zoom kept in memory, 64 MB of 512 numbers


class TileCentres:
    """Embeddings of tiles' centres, each computed once: kept in memory and, with a folder, on the disk."""

    def __init__(self, bundle: EngineBundle, locations: LocationEncoder, folder: Path | None) -> None:
        self._locations, self._width = locations, bundle.embed_dim
        self._cache = None if folder is None else RowCache(folder, _maker(bundle))
        self._known: dict[int, tuple[Ids, HalfRows]] = {}
        self._lock = threading.Lock()

    def embed(self, zoom: int, xy: NDArray[np.int64]) -> HalfRows:
        """Return the embeddings float16[n, d] of the centres of tiles int64[n, 2]."""
        ids, first, back = np.unique(tile_ids(xy), return_index=True, return_inverse=True)
        with self._lock:
            known_ids, known = self._known.get(zoom, (ids[:0], np.empty((0, self._width), np.float16)))
            rows = np.empty((len(ids), self._width), dtype=np.float16)
            place = np.minimum(np.searchsorted(known_ids, ids), max(0, len(known_ids) - 1))
            found = known_ids[place] == ids if len(known_ids) else np.zeros(len(ids), dtype=bool)
            rows[found] = known[place[found]]
            new = np.flatnonzero(~found)
            if len(new):
                rows[new] = self._stored_or_computed(zoom, ids[new], xy[first[new]])
                if len(known_ids) + len(new) > _MOST_ROWS:
                    known_ids, known = ids[:0], rows[:0]
                    new = np.arange(min(len(ids), _MOST_ROWS))
                at = np.searchsorted(known_ids, ids[new])
                self._known[zoom] = (
                    np.insert(known_ids, at, ids[new]),
                    np.insert(known, at, rows[new], axis=0),
                )
        return np.asarray(rows[back.reshape(-1)])

    def _stored_or_computed(self, zoom: int, ids: Ids, xy: NDArray[np.int64]) -> HalfRows:
        rows = np.zeros((len(ids), self._width), dtype=np.float16)
        stored = np.zeros(len(ids), dtype=bool)
        if self._cache is not None:
            self._cache.refresh()
            stored = self._cache.look_up(zoom, ids, rows)
        lacking = np.flatnonzero(~stored)
        if len(lacking):
            rows[lacking] = self._locations.embed(centers(zoom, xy[lacking])).astype(np.float16)
            if self._cache is not None:
                self._cache.keep(zoom, ids[lacking], rows[lacking])
        return rows


def _maker(bundle: EngineBundle) -> Maker:
    return Maker(
        encoder=encoder_hash(bundle.manifest),
        source="tile centres",
        width=bundle.embed_dim,
        model=model_name(bundle.manifest),
        backend=ONNXRUNTIME_CPU,
        variant=Variant.fp32,
        tiles="tile centres",
        attribution="",
        world=bundle.world,
    )


class GeoClipEvidence:
    """GeoCLIP's log-probability of tiles for some photos; a `TileEvidence` of the search.

    `embeddings` are the photos', float32[p, d] of unit length.
    """

    name = "geoclip"

    def __init__(
        self,
        gallery: Gallery,
        centres: TileCentres,
        logit_scale: float,
        embeddings: NDArray[np.float32],
    ) -> None:
        self._gallery, self._centres, self._logit_scale = gallery, centres, logit_scale
        self._embeddings = embeddings
        sums = np.empty((len(embeddings), len(gallery.ids) + 1))
        for photo in range(len(embeddings)):  # one by one bounds the memory
            _, shares = gallery.shares(embeddings[photo : photo + 1], logit_scale)
            np.cumsum(shares[0], out=sums[photo, 1:])
        sums[:, 0] = 0
        self._sums = sums

    def weight(self, zoom: int) -> float:
        """Return the weight of a zoom's evidence where none has been fitted."""
        return 1.0 if zoom <= MASS_ZOOM else 0.5 if zoom <= CENTRE_ZOOM else 0.0

    def log_probability(
        self, photos: NDArray[np.int64], zoom: int, xy: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return float32[p, n], natural logarithms, of tiles int64[n, 2] of a zoom for photos given by row.

        Of zooms to MASS_ZOOM it is the gallery's share inside the tile, of those to CENTRE_ZOOM the location
        encoder's at its centre up to a constant per photo, and of deeper ones 0.
        """
        if zoom <= MASS_ZOOM:
            begin, end = self._gallery.ranges(zoom, xy)
            sums = self._sums[photos]
            mass = np.maximum(sums[:, end] - sums[:, begin], 0)
            return np.log((1 - FLOOR) * mass + FLOOR / 4.0**zoom).astype(np.float32)
        if zoom <= CENTRE_ZOOM and len(xy):
            rows = self._centres.embed(zoom, xy)
            return np.float32(self._logit_scale) * cosines(rows, self._embeddings[photos])
        return np.zeros((len(photos), len(xy)), dtype=np.float32)
