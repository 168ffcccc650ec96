"""What a photo costs with GeoCLIP: embedding it, comparing it with the gallery, and saying what tiles hold.

Run as `python -m geoengine.bench.geoclip engines/` on a bundle that `build-engines --geoclip` made; random
weights of CLIP do for timing. All figures are medians of interleaved rounds in one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.suite.machine import describe
from geoengine.bench.suite.results import machine_folder
from geoengine.bench.suite.timing import Spread, interleaved
from geoengine.engine.backends import BACKENDS, Backend, open_backend
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError, BundleError
from geoengine.engine.geoclip import GeoClip
from geoengine.engine.geoclip.evidence import TileCentres
from geoengine.engine.geoclip.gallery import Gallery
from geoengine.engine.manifest import PHOTO, model_name
from geoengine.engine.tiles import all_xy, descendants_xy, great_circle_km_array

_CANDIDATES = 256  # tiles of a level at k = 16
_SAMPLE = 2000  # points whose nearest other is looked for
_ALONE = """
import sys
import numpy as np
from geoengine import GeoEngine

folder, backend, precision = sys.argv[1:]
with GeoEngine.open(folder, backend=backend, precision=precision) as engine:
    engine.locate([np.zeros((300, 400, 3), np.uint8)], method="geoclip")
# Linux's own count; that of getrusage would begin with the parent's.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def measure(bundle: EngineBundle, rounds: int) -> dict[str, Any]:
    """Time all parts; returns JSON-ready figures, times in seconds, sizes in bytes."""
    own = bundle.geoclip()
    if own is None:
        raise BundleError(f"{bundle.path} has no GeoCLIP: `geoengine build-engines --geoclip` adds it")
    geoclip = GeoClip.open(own, backend="auto")
    query = _unit(own.embed_dim)
    parts = {name: times.median for name, times in _parts(geoclip, query, rounds).items()}
    files = {name: entry.bytes for name, entry in own.manifest.files.items()}
    return {
        "model": model_name(own.manifest),
        "variants": list(own.variants),
        "machine": describe(),
        "rounds": rounds,
        "gallery_points": len(geoclip.gallery.points),
        "photo": _photo_figures(own, rounds),
        "parts_s": parts,
        "gallery_speedup": parts["encode the gallery again"] / parts["compare with the gallery"],
        "nearest_point": _spacing(geoclip.gallery),
        "parity": own.manifest.parity,
        "bytes": files | {"all": sum(files.values())},
    }


def report(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    machine = figures["machine"]
    on = f"{machine['cores']} cores of {machine['cpu']}, {machine['date']}"
    least, spacing = figures["parity"], figures["nearest_point"]
    photo = ", ".join(
        f"{least[variant]['photo']['min_cosine']:.5f} of the photo encoder in {variant}"
        for variant in figures["variants"]
    )
    lines = [
        f"# GeoCLIP, measured on {on}",
        "",
        f"{figures['model']}. Medians of {figures['rounds']} interleaved rounds; "
        f"the load average was {machine['load']:.0f}, and above the number of cores only ratios mean much.",
        "",
        "| one photo, on | time | memory of a process that answers for it |",
        "| --- | ---: | ---: |",
        *(
            f"| {name} | {_time(own['seconds'])} | {own['peak_bytes'] / 1e6:,.0f} MB |"
            for name, own in figures["photo"].items()
        ),
        "",
        "| then, on the CPU | time |",
        "| --- | ---: |",
        *(f"| {name} | {_time(seconds)} |" for name, seconds in figures["parts_s"].items()),
        "",
        f"Comparing with {figures['gallery_points']:,} points is {figures['gallery_speedup']:,.0f} times as "
        "fast as encoding them again for every photo, which the published package does.",
        "",
        "| file | MB |",
        "| --- | ---: |",
        *(f"| {name} | {size / 1e6:.1f} |" for name, size in figures["bytes"].items() if size > 1e6),
        "",
        f"Least cosine to PyTorch: {least['location']['min_cosine']:.7f} of the location encoder, {photo}.",
        "",
        f"Of the gallery's points, half have another within {spacing['median_km']:.2f} km, and "
        f"{spacing['within_25_km']:.1%} within 25 km.",
    ]
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _spacing(gallery: Gallery) -> dict[str, float]:
    """Return how far the gallery's points are from the nearest other, of some of them."""
    rows = np.random.default_rng(0).permutation(len(gallery.points))[:_SAMPLE]
    nearest = np.empty(len(rows))
    for number, row in enumerate(rows):
        lng, lat = gallery.points[row]
        distances = great_circle_km_array(lng, lat, gallery.points[:, 0], gallery.points[:, 1])
        nearest[number] = np.partition(distances, 1)[1]
    return {"median_km": float(np.median(nearest)), "within_25_km": float((nearest <= 25).mean())}


def _parts(geoclip: GeoClip, query: NDArray[np.float32], rounds: int) -> dict[str, Spread]:
    """Time what happens to a photo's embedding, round by round."""
    bundle, zero = geoclip.bundle, np.array([0])
    coarse, fine = all_xy(4), descendants_xy(all_xy(2)[:16], 2, 4)[:_CANDIDATES]

    def centres() -> None:
        TileCentres(bundle, geoclip.locations, None).embed(10, coarse + 300)

    evidence = geoclip.evidence(query)
    evidence.log_probability(zero, 10, fine)
    work: dict[str, Callable[[], object]] = {
        "compare with the gallery": lambda: geoclip.best(query, 5),
        # What the published package does at every call, here by our own encoder.
        "encode the gallery again": lambda: geoclip.locations.embed_plain(geoclip.gallery.points),
        "make the evidence": lambda: geoclip.evidence(query),
        f"evidence of {_CANDIDATES} tiles, zoom 4": lambda: evidence.log_probability(zero, 4, coarse),
        f"evidence of {_CANDIDATES} known tiles, zoom 10": lambda: evidence.log_probability(zero, 10, fine),
        f"embed {_CANDIDATES} tile centres": centres,
    }
    return interleaved(work, rounds, warm_up=0)


def _photo_figures(bundle: EngineBundle, rounds: int) -> dict[str, dict[str, float]]:
    """Time one photo, alone, on every backend and variant that runs here; weigh a process that does it."""
    picture = np.random.default_rng(0).integers(
        0, 256, (1, bundle.image_size, bundle.image_size, 3), np.uint8
    )
    with ExitStack() as stack:
        opened: dict[tuple[str, str], Backend] = {}
        for name, variant in itertools.product(BACKENDS, bundle.variants):
            with suppress(BackendError):
                backend = open_backend(bundle, backend=name, precision=variant)
                stack.callback(backend.close)
                backend.encode(PHOTO, picture)  # loads the graphs
                opened[name, variant] = backend
        work = {key: partial(backend.encode, PHOTO, picture) for key, backend in opened.items()}
        times = interleaved(work, rounds, warm_up=0)
    return {
        f"{name} {variant}": {
            "seconds": own.median,
            "peak_bytes": _peak_bytes(bundle, name, variant),
        }
        for (name, variant), own in times.items()
    }


def _peak_bytes(bundle: EngineBundle, backend: str, variant: str) -> int:
    """Return the most memory that a process of its own takes to answer for one photo by GeoCLIP alone."""
    command = [sys.executable, "-c", _ALONE, str(bundle.path), backend, variant]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024


def _unit(width: int) -> NDArray[np.float32]:
    row = np.random.default_rng(0).normal(size=(1, width)).astype(np.float32)
    return np.asarray(row / np.linalg.norm(row), dtype=np.float32)


def main() -> None:
    """Measure a bundle, print the figures, and write them with --out, as JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of results")
    options = parser.parse_args()
    figures = measure(EngineBundle.open(options.bundle), options.rounds)
    print(report(figures), end="")
    if options.out is not None:
        folder = machine_folder(options.out)
        (folder / "geoclip.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        (folder / "geoclip.md").write_text(report(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
