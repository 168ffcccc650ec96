"""What a million and a thousand million photos cost, and indices of the land: measured, and computed from it.

    python -m geoengine.bench.bulk_cost photos [--count 64]    on the demo planet: photos, tiles and bytes
    python -m geoengine.bench.bulk_cost ray [--rounds 3]       a Ray cluster of two workers, and of one
    python -m geoengine.bench.bulk_cost --write                puts the tables into docs/scale.md

Each measurement replaces its part of `bench/results/amd-epyc-2-cores/bulk_cost.json`. How many tiles groups
of other sizes would have shared is computed from the beams, which do not depend on the group.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geoengine.bench.bulk_cost_tables import DOCUMENT, RESULTS, render
from geoengine.bench.suite.machine import describe
from geoengine.bench.truth import PlanetPhotos
from geoengine.engine.bulk.engines import EngineSpec
from geoengine.engine.bulk.formats import ResultFiles, ResultFormat
from geoengine.engine.bulk.items import Items
from geoengine.engine.bulk.jobs import JobOrder, Target, open_job
from geoengine.engine.bulk.parts import PartDone
from geoengine.engine.bulk.running import run_job
from geoengine.engine.bulk.spread import LocateWork, parts_of
from geoengine.engine.bulk.stream import PhotoSearch
from geoengine.engine.cluster import Cluster, Workers, open_cluster
from geoengine.engine.photo_sets import open_photo_set
from geoengine.engine.photos import PhotoLimits
from geoengine.engine.regions.countries import Land
from geoengine.engine.search import SearchConfig
from geoengine.engine.tiles import Tile, all_xy, descendants_xy

GROUPS = (1, 4, 16, 64, 256)
"""Photos searched together."""

LAND_ZOOMS = (4, 6, 8, 10, 12, 14)

_SPEC = EngineSpec(
    bundle="planet",
    tiles="planet",
    index=None,
    backend="onnxruntime-cpu",
    precision=None,
    threads=1,
    keeps_rows=False,
)


def measure_photos(count: int) -> dict[str, Any]:
    """Locate photos of the planet at k = 16: processor time, tiles shared, bytes of results.

    Processor time is that of all threads, so that other work on the machine does little to it.
    """
    search = PhotoSearch(config=SearchConfig(), limits=PhotoLimits())
    with drawn_photos(count) as items, _SPEC.open() as engine, tempfile.TemporaryDirectory() as folder:
        engine.locate([engine.prepare(np.zeros((224, 224, 3), np.uint8))], config=SearchConfig(k=1))
        out = Path(folder) / "results.jsonl"
        start = time.process_time()
        with open_job(Target.parse(out, None), _order(items, count)) as job:
            for _ in run_job(engine, job, items, search):
                pass
        seconds = time.process_time() - start
        records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        sizes = {}
        for kind in ResultFormat:
            ResultFiles(format=kind, world="planet", about={}).write(Path(folder) / kind, records)
            sizes[kind.value] = (Path(folder) / kind).stat().st_size / count
    beams = [_beams(record) for record in records]
    by_answer = sorted(beams, key=lambda levels: levels[max(levels)][0])  # the best sorting there could be
    return {
        "machine": describe(),
        "count": count,
        "k": SearchConfig().k,
        "core_seconds_per_photo": seconds / count,
        "bytes": sizes,
        "tiles_per_photo": {str(size): tiles_per_photo(beams, size) for size in GROUPS if size <= count},
        "sorted_tiles_per_photo": {
            str(size): tiles_per_photo(by_answer, size) for size in GROUPS if size <= count
        },
    }


def tiles_per_photo(beams: Sequence[dict[int, list[Tile]]], size: int) -> float:
    """Return how many tiles a photo costs when as many are searched together, each tile once a search."""
    tiles = 0
    for start in range(0, len(beams), size):
        group = beams[start : start + size]
        levels = sorted(group[0])
        tiles += len(all_xy(levels[0]))
        for above, zoom in itertools.pairwise(levels):
            kept = {tile for levels_of in group for tile in levels_of[above]}
            tiles += len(descendants_xy([tile[1:] for tile in kept], above, zoom))
    return tiles / len(beams)


def measure_ray(rounds: int, parts: int) -> dict[str, Any]:
    """Locate photos with one worker and with two, of a core each, in turn: their rates once at work."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with (
        drawn_photos(4 * parts) as items,
        open_cluster("local", count=2, threads=1),
        tempfile.TemporaryDirectory() as folder,
    ):
        for number in range(rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                out = Path(folder) / f"{number}-{count}.jsonl"
                own = Cluster(Workers(count=count, cpus=1, gpus=0))
                with open_job(Target.parse(out, None), _order(items, 4)) as job:
                    work = PinnedWork(
                        spec=_SPEC,
                        search=PhotoSearch(config=SearchConfig(k=4), limits=PhotoLimits()),
                        parts=job.parts,
                        identity=job.order.identity,
                    )
                    done = own.map(work, list(parts_of(job.rest(items))))
                    rates[count].append(steady_rate(done, count))
                    job.finish()
    return {
        "machine": describe(),
        "photos": 4 * parts,
        "rounds": rounds,
        "rates": {str(count): rate for count, rate in rates.items()},
        "ratio": statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True)),
    }


def steady_rate(done: Iterator[PartDone], workers: int) -> float:
    """Return photos a second, from when each worker has written its first part."""
    times, photos = [], []
    for part in done:
        times.append(time.perf_counter())
        photos.append(part.located + part.failed)
    return sum(photos[workers:]) / (times[-1] - times[workers - 1])


@dataclass(kw_only=True)
class PinnedWork(LocateWork):
    """Locates parts on one core, another one in each worker: reading tiles would else take a second one."""

    def begin(self) -> None:
        """Take a core that no other worker of the job has, and open the engine."""
        for core in sorted(os.sched_getaffinity(0)):
            with contextlib.suppress(FileExistsError):
                (self.parts.folder / f"core-{core}").mkdir()
                os.sched_setaffinity(0, {core})
                break
        LocateWork.begin(self)


def _order(items: Items, part_photos: int) -> JobOrder:
    from geoengine.engine.bulk.identity import bundle_identity
    from geoengine.engine.bundle import EngineBundle, resolve_bundle
    from geoengine.engine.sources.planet import PlanetSource

    bundle = EngineBundle.open(resolve_bundle("planet"))
    identity = {"encoders": bundle_identity(bundle), "tiles": PlanetSource().identity}
    return JobOrder(identity=identity, world="planet", about={}, part_photos=part_photos)


def _beams(record: dict[str, Any]) -> dict[int, list[Tile]]:
    return {
        level["zoom"]: [Tile(tile["z"], tile["x"], tile["y"]) for tile in level["beam"]]
        for level in record["levels"]
    }


@contextlib.contextmanager
def drawn_photos(count: int) -> Iterator[Items]:
    """Draw photos of the planet into a folder for the block."""
    with tempfile.TemporaryDirectory() as folder:
        for number, photo in enumerate(PlanetPhotos(count, 99)):
            Image.fromarray(photo.read().pixels).save(Path(folder) / f"{number:05d}.png")
        yield Items([open_photo_set(folder)])


def land_tiles() -> dict[str, int]:
    """Return how many tiles of each zoom `index build --land` embeds."""
    land = Land()
    counts = {zoom: len(land.tiles(min(zoom, 10))) * 4 ** max(0, zoom - 10) for zoom in LAND_ZOOMS}
    return {str(zoom): count for zoom, count in counts.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["photos", "ray"])
    parser.add_argument("--count", type=int, default=64, help="photos to locate")
    parser.add_argument("--rounds", type=int, default=3, help="times that one and two workers are compared")
    parser.add_argument("--parts", type=int, default=16, help="parts of four photos in each comparison")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.part == "photos":
        results["photos"] = measure_photos(options.count)
    elif options.part == "ray":
        results["ray"] = measure_ray(options.rounds, options.parts)
    results["land"] = land_tiles()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.part:
        print(json.dumps(results[options.part], indent=2))
    if options.write:
        DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
