"""Embeddings of tiles met in searches, kept in memory while a process runs, the newest only."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.index.segments import HalfRows, Ids


class MemoryRows:
    """A `RowStore` in memory: at most `most_bytes` of fp16 embeddings of length `width`, for many threads.

    When it is full, the tiles that were looked up least recently go. Nothing of it reaches a disk.
    """

    def __init__(self, width: int, most_bytes: int) -> None:
        self._room = max(1, most_bytes // (2 * width))
        # Pages of rows that are not there yet are never touched.
        self._rows = np.empty((self._room, width), dtype=np.float16)
        self._places: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Nobody else adds to it."""

    def look_up(self, zoom: int, ids: Ids, into: HalfRows) -> NDArray[np.bool_]:
        """Copy the embeddings of tiles into fp16[n, d]; return which were found."""
        found = np.zeros(len(ids), dtype=bool)
        with self._lock:
            places = [self._places.get((zoom, tile)) for tile in ids.tolist()]
            for row, (tile, place) in enumerate(zip(ids.tolist(), places, strict=True)):
                if place is not None:
                    self._places.move_to_end((zoom, tile))
                    found[row] = True
            into[found] = self._rows[[place for place in places if place is not None]]
        return found

    def keep(self, zoom: int, ids: Ids, rows: HalfRows) -> None:
        """Add tiles and their embeddings fp16[n, d]."""
        with self._lock:
            for tile, row in zip(ids.tolist(), rows, strict=True):
                place = self._places.pop((zoom, tile), None)
                if place is None:
                    place = len(self._places)
                    if place == self._room:
                        _, place = self._places.popitem(last=False)
                self._places[zoom, tile] = place
                self._rows[place] = row
