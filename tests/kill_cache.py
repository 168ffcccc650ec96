"""Kills processes that write a tile cache, and looks for damage: `python tests/kill_cache.py 60`.

Each process writes and evicts all the time, so that kills hit every kind of statement, and the file goes from
one process to the next. The test suite does a few kills.
"""

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from made_tiles import colour_of

from geoengine.engine.sources.cache import STATE_TABLE, TileCache
from geoengine.engine.sources.decode import decode_tile
from geoengine.engine.sources.mbtiles import IDENTITY_KEY
from geoengine.engine.tiles import Tile, tms_row

METADATA = {"name": "test", IDENTITY_KEY: "of the source"}

WRITER = """
import itertools, sys
from pathlib import Path
from geoengine.engine.sources.cache import TileCache
from geoengine.engine.tiles import Tile
from kill_cache import METADATA
from made_tiles import tile_picture
cache = TileCache(Path(sys.argv[1]), METADATA, limit_bytes=300_000)
for i in itertools.count(int(sys.argv[2])):
    tile = Tile(12, i % 4096, 5)
    cache.put(tile, tile_picture(*tile, size=24), float("inf"))
    if i == int(sys.argv[2]):
        cache.flush()
        print("writing", flush=True)
"""


def kill_writer(path, dice, *, longest_s=0.3):
    """Start a process that writes the cache at `path`, and kill it at some moment."""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", WRITER, str(path), str(dice.randrange(4096))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        time.sleep(dice.uniform(0, longest_s))
        process.kill()


def damage(path):
    """Look at every tile of a cache, and count what is there and what is wrong."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        found = Counter(opens=1)
        found["damaged file"] = int(database.execute("PRAGMA integrity_check").fetchall() != [("ok",)])
        tiles = database.execute("SELECT zoom_level, tile_column, tile_row, tile_data FROM tiles").fetchall()
        states = database.execute(f"SELECT zoom_level, tile_column, tile_row FROM {STATE_TABLE}").fetchall()
    found["tiles"] = len(tiles)
    found["tiles without state, or the reverse"] = len({key[:3] for key in tiles} ^ set(states))
    addresses = []
    for z, x, row, data in tiles:
        tile = Tile(z, x, tms_row(Tile(z, x, row)))
        pixels = decode_tile(data)
        found["damaged tiles"] += int(pixels is None or tuple(pixels[0, 0]) != colour_of(*tile))
        addresses.append(tile)
    with contextlib.closing(TileCache(path, METADATA)) as cache:
        found["tiles the cache does not give"] = len(addresses) - len(cache.get(addresses))
    return found


def main(kills):
    """Kill so many processes and print what was found, as JSON."""
    dice, found = random.Random(0), Counter(kills=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.mbtiles"
        for _ in range(kills):
            kill_writer(path, dice)
            found += Counter({"kills": 1, "journals left": int(path.with_name(f"{path.name}-wal").exists())})
            found.update(damage(path))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
