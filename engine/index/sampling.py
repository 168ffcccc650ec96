"""Comparing an index with what the encoders and the tiles give today."""

from __future__ import annotations

import numpy as np

from geoengine.engine.backends import Backend
from geoengine.engine.index.errors import TileIndexError
from geoengine.engine.index.segments import tiles_of_ids
from geoengine.engine.index.tile_index import TileIndex
from geoengine.engine.manifest import encoder_name
from geoengine.engine.pictures import hand_on
from geoengine.engine.sources import TileSource

LEAST_COSINE = 0.98
"""Less than that is not rounding, not even that of int8, but another picture."""


def compare_sample(
    index: TileIndex, source: TileSource, backend: Backend, count: int, *, seed: int = 0
) -> tuple[int, float]:
    """Embed `count` tiles of each zoom again; returns how many that were and the least cosine.

    Raises TileIndexError when a tile is not there any more, or has another embedding.
    """
    rng = np.random.default_rng(seed)
    compared, least = 0, 1.0
    for zoom, segments in sorted(index.segments.items()):
        segment = max(segments, key=lambda one: len(one.ids))
        rows = np.sort(rng.choice(len(segment.ids), min(count, len(segment.ids)), replace=False))
        if not len(rows):
            continue
        xy = tiles_of_ids(segment.ids[rows])
        fresh = backend.rows(encoder_name(zoom), len(xy))
        arrived = hand_on(source, zoom, xy, fresh.append, batch=backend.batch, progress=lambda done: None)
        if (arrived.rows < 0).any():
            x, y = xy[np.argmin(arrived.rows)].tolist()
            raise TileIndexError(f"{index.path}: {source.name} has no tile {zoom}/{x}/{y} any more")
        cosines = (fresh.download()[arrived.rows] * segment.rows[rows].astype(np.float32)).sum(axis=1)
        worst = int(np.argmin(cosines))
        if cosines[worst] < LEAST_COSINE:
            x, y = xy[worst].tolist()
            raise TileIndexError(
                f"{index.path}: tile {zoom}/{x}/{y} has another embedding now, with a cosine of "
                f"{cosines[worst]:.3f} to the one in the index: the tiles have changed, build the index again"
            )
        compared, least = compared + len(rows), min(least, float(cosines[worst]))
    return compared, least
