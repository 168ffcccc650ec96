"""How fast tiles are decoded, and by what: `python -m geoengine.bench.decoding`.

Batches of made JPEG tiles go through OpenCV on all cores, nvImageCodec on the CPU, and, where there is one,
nvImageCodec on the GPU, in interleaved rounds; and the same tiles go from an MBTiles file to staged pixels,
as in a search. With a GPU, the pixels of the decoders are compared too.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from geoengine.engine.errors import SourceError
from geoengine.engine.sources.decoders import (
    Decoder,
    NvImageCodecDecoder,
    OpenCvDecoder,
    made_tile,
    seconds_per_batch,
)
from geoengine.engine.sources.mbtiles import MBTilesSource
from geoengine.engine.sources.streaming import Encoded, stream

ZOOM = 10


def usable_decoders() -> dict[str, Decoder]:
    """Return the decoders that run here, by name; says on stderr which do not."""
    usable: dict[str, Decoder] = {"opencv": OpenCvDecoder()}
    for name, on_gpu in (("nvimgcodec-cpu", False), ("nvimgcodec-gpu", True)):
        try:
            usable[name] = NvImageCodecDecoder(on_gpu=on_gpu)
        except SourceError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return usable


def write_tiles(path: Path, data: bytes, count: int) -> None:
    """Write an MBTiles file with the same picture `count` times, in one row of zoom 10 after the other."""
    rows = ((ZOOM, number % 1024, number // 1024, data) for number in range(count))
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE metadata (name text, value text)")
        database.execute(
            "CREATE TABLE tiles (zoom_level integer, tile_column integer, tile_row integer, tile_data blob, "
            "PRIMARY KEY (zoom_level, tile_column, tile_row)) WITHOUT ROWID"
        )
        database.executemany("INSERT INTO tiles VALUES (?, ?, ?, ?)", rows)


def staged_tiles_per_s(source: MBTilesSource, decoder: Decoder, count: int, threads: int) -> float:
    """Read tiles from a file into batches, and return tiles a second."""
    start_s = time.perf_counter()
    jobs = (
        (number, partial(Encoded, source.tile_data(ZOOM, number % 1024, 1023 - number // 1024)))
        for number in range(count)
    )
    batches = stream(jobs, workers=threads, tile_size=lambda _: source.tile_size, decoder=decoder)
    got = sum(len(batch.positions) for batch in batches)
    assert got == count, f"{count - got} of {count} tiles did not come"
    return count / (time.perf_counter() - start_s)


def largest_difference(one: Decoder, other: Decoder, tile: bytes) -> int:
    """Return how far apart two decoders' values of a pixel are at most."""
    pictures = [decoder.decode([tile])[0] for decoder in (one, other)]
    values = [np.asarray(picture, np.int16) for picture in pictures if picture is not None]
    return int(np.abs(values[0] - values[1]).max())


def measure(size: int, count: int, rounds: int) -> dict[str, object]:
    """Measure all decoders with tiles of one size, in interleaved rounds."""
    from geoengine.engine.cores import available_cores

    decoders, tile, threads = usable_decoders(), made_tile(size), available_cores()
    alone: dict[str, list[float]] = {name: [] for name in decoders}
    staged: dict[str, list[float]] = {name: [] for name in decoders}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiles.mbtiles"
        write_tiles(path, tile, count)
        with closing(MBTilesSource(path)) as source:
            for number in range(rounds):
                for name, decoder in decoders.items():
                    alone[name].append(256 / seconds_per_batch(decoder, [tile] * 256))
                    staged[name].append(staged_tiles_per_s(source, decoder, count, threads))
                print(f"{size} px, round {number + 1} of {rounds}", file=sys.stderr)
    return {
        "side_px": size,
        "bytes_per_tile": len(tile),
        "threads": threads,
        "decoded_tiles_per_s": {name: round(statistics.median(alone[name])) for name in decoders},
        "staged_tiles_per_s": {name: round(statistics.median(staged[name])) for name in decoders},
        "largest_difference": {
            name: largest_difference(decoders["opencv"], decoder, tile) for name, decoder in decoders.items()
        },
    }


def main() -> None:
    """Measure and print one JSON object per tile size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--out", type=Path, help="a file for the JSON lines, too")
    options = parser.parse_args()
    lines = [json.dumps(measure(size, options.tiles, options.rounds)) for size in options.sizes]
    print("\n".join(lines))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
