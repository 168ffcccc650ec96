"""What a tile index saves: searches cold and warm.

    python -m geoengine.bench.tile_index --bundle DIR [--k 16]

Locates one photo over a local MBTiles file, whose pictures stand for all tiles of the world: with
nothing known, and with an index of the first levels and the rows of the first search. Beside it stands what
the encoder alone needs for the distinct pictures of the first search, already decoded: its time, which other
work on the machine makes doubtful, its processor time, and how long the first search spent in the encoder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.engine import GeoEngine
from geoengine.engine.index.segments import write_segment
from geoengine.engine.index.tile_index import Area, Description, Maker, level_file
from geoengine.engine.manifest import encoder_name
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import TileBatch
from geoengine.engine.sources.mbtiles import MBTilesSource
from geoengine.engine.tiles import all_xy

ROUNDS = 15
K = 16
POOL_ZOOM = 6  # of the file whose 4096 pictures stand for all tiles
INDEXED = (4, 6, 8)


class PooledTiles:
    """Every tile of the world: one of the 4096 pictures of an MBTiles file, chosen by its address."""

    attribution, storable = "", True
    min_zoom, max_zoom = 0, 18

    def __init__(self, file: Path, world: str) -> None:
        self.world = world
        self._pool = MBTilesSource(file)
        self.name, self.identity = self._pool.name, self._pool.identity
        self.tile_size, self.bounds = self._pool.tile_size, self._pool.bounds

    def read(self, z: int, xy: NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the pictures of the tiles."""
        mixed = (xy[:, 0] * 73_856_093 ^ xy[:, 1] * 19_349_663 ^ z * 83_492_791) & 0xFFFFFFF
        picture = mixed % (1 << (2 * POOL_ZOOM))
        yield from self._pool.read(
            POOL_ZOOM, np.stack([picture >> POOL_ZOOM, picture & ((1 << POOL_ZOOM) - 1)], axis=1)
        )

    def close(self) -> None:
        """Close the file."""
        self._pool.close()


def write_pool(file: Path) -> None:
    """Write an MBTiles file with 4096 different JPEG pictures of 256 pixels."""
    import sqlite3

    import cv2

    rng = np.random.default_rng(0)
    n = 1 << POOL_ZOOM
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE metadata (name TEXT, value TEXT)")
        database.execute(
            "CREATE TABLE tiles (zoom_level INT, tile_column INT, tile_row INT, tile_data BLOB, "
            "PRIMARY KEY (zoom_level, tile_column, tile_row))"
        )
        for x, y in all_xy(POOL_ZOOM).tolist():
            coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            picture = cv2.resize(coarse, (256, 256), interpolation=cv2.INTER_CUBIC)
            data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
            row = (POOL_ZOOM, x, n - 1 - y, data)
            database.execute("INSERT INTO tiles VALUES (?, ?, ?, ?)", row)
    database.close()


def measure_search(opened: EngineBundle, k: int, threads: int | None, folder: Path) -> dict[str, Any]:
    """Locate a photo with nothing known, time the encoder alone, and locate it again with all known."""
    file = folder / "pool.mbtiles"
    write_pool(file)
    photo = np.random.default_rng(3).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    config = SearchConfig(k=k)
    rows = folder / "rows"
    with GeoEngine.open(
        opened.path, PooledTiles(file, opened.world), threads=threads, row_cache=rows
    ) as engine:
        engine.embed_photos([engine.prepare(photo)])
        for zoom in engine.bundle.levels:  # graphs are loaded when they are first needed
            engine.backend.encode(encoder_name(zoom), np.zeros((2, 256, 256, 3), np.uint8))
        alone = [encode_alone(engine, 128)]
        in_encoder_s, timed = [0.0], engine.backend.encode

        def encode(encoder: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            start = time.perf_counter()
            embeddings = timed(encoder, pixels)
            in_encoder_s[0] += time.perf_counter() - start
            return embeddings

        engine.backend.encode = encode  # type: ignore[method-assign]
        start, start_cpu = time.perf_counter(), time.process_time()
        [cold] = engine.locate([photo], config=config)
        cold_s, cold_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
        engine.backend.encode = timed  # type: ignore[method-assign]
        alone.append(encode_alone(engine, 128))
        embedded = sum(level.candidates - level.known for level in cold.levels)
        start = time.perf_counter()
        [again] = engine.locate([photo], config=config)
        seen_s = time.perf_counter() - start
        name = f"{engine.backend.name}, {engine.backend.variant}"
    indexed = measure_indexed(opened, config, threads, file, photo, folder)
    alone_s, alone_cpu_s = (embedded * statistics.mean(one) / 128 for one in zip(*alone, strict=True))
    return {
        "backend": name,
        "k": k,
        "embedded": embedded,
        "cold_s": cold_s,
        "cold_over_time_in_encoder": cold_s / in_encoder_s[0],
        "cold_over_encoder_alone": cold_s / alone_s,
        "cold_over_encoder_alone_cpu": cold_cpu_s / alone_cpu_s,
        "seen_before_ms": 1e3 * seen_s,
        "cold_over_seen_before": cold_s / seen_s,
        "same_answer": again.point == cold.point,
    } | indexed


def encode_alone(engine: GeoEngine, count: int) -> tuple[float, float]:
    """Return seconds, and seconds of the processor, in which the encoder embeds decoded pictures."""
    source = engine.source
    xy = np.random.default_rng(7).integers(0, 1 << 12, (count, 2))
    pictures = np.concatenate([batch.pixels for batch in source.read(12, xy)])[:count]
    batch = engine.backend.batch
    start, start_cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(pictures), batch):
        engine.backend.encode(encoder_name(12), pictures[first : first + batch])
    return time.perf_counter() - start, time.process_time() - start_cpu


def measure_indexed(
    opened: EngineBundle,
    config: SearchConfig,
    threads: int | None,
    file: Path,
    photo: NDArray[np.uint8],
    folder: Path,
) -> dict[str, Any]:
    """Locate a photo with zooms 4 to 8 in an index and the deeper rows seen before.

    The index has random rows: its scoring takes the same time, and embedding 70 000 tiles takes an hour.
    """
    target = folder / "index"
    target.mkdir()
    rng = np.random.default_rng(0)
    tiles = partial(PooledTiles, file, opened.world)
    with GeoEngine.open(opened.path, tiles(), threads=threads) as engine:
        maker = Maker.of(opened, engine.source, engine.backend)
    for zoom in INDEXED:
        ids = np.arange(4**zoom, dtype=np.uint64)
        values = rng.normal(size=(len(ids), opened.embed_dim)).astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        write_segment(level_file(target, zoom), zoom, ids, ids[:0], opened.embed_dim, [values])
    Description(maker=maker, areas=(Area(),), complete=INDEXED).write(target)
    times = []
    with GeoEngine.open(
        opened.path, tiles(), threads=threads, index=target, row_cache=folder / "rows"
    ) as engine:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            [location] = engine.locate([photo], config=config)
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        engine.embed_photos([engine.prepare(photo)])
        photo_s = time.perf_counter() - start
    return {
        "warm_ms": 1e3 * statistics.median(times[1:]),
        "best_warm_ms": 1e3 * min(times),
        "of_which_photo_ms": 1e3 * photo_s,
        "warm_known": sum(level.known for level in location.levels),
        "warm_candidates": sum(level.candidates for level in location.levels),
    }


def main() -> None:
    """Print figures as a JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where files are written; a temporary folder by default")
    parser.add_argument("--bundle", default="planet", help="engine bundle for the search")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        opened = EngineBundle.open(arguments.bundle)
        print(json.dumps(measure_search(opened, arguments.k, arguments.threads, Path(folder))))


if __name__ == "__main__":
    main()
