"""The tables of docs/scale.md: what was measured, and what follows for many photos and for indices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geoengine.bench.readme import filled, table
from geoengine.bench.suite.peers_encoders import encoder_rows

_ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = _ROOT / "docs" / "scale.md"
RESULTS = _ROOT / "bench" / "results" / "amd-epyc-2-cores" / "bulk_cost.json"
ENCODERS = RESULTS.with_name("peers.json")

K = 16
LEVELS = (4, 6, 8, 10, 12, 14, 16)
WIDTH = 512
"""Of ViT-B/32's embeddings, in half precision; 8 bytes more for the tile's number."""

PHOTO_COUNTS = (10**6, 10**9)
INDEXED = (0, 8, 10, 12, 14)
"""The deepest zooms with an index of the land, 0 for none."""

TILE_BYTES = 15_000  # of a JPEG tile of 256 pixels: an assumption that the document names
CORES, GPUS = 64, 8  # of a machine
WITHIN_S = {10**6: 12 * 3600.0, 10**9: 30 * 24 * 3600.0}
"""Overnight, and a month."""

GPU_IMAGES = (1_000, 5_000)  # a second; what-ifs, not measurements
_HOUR, _YEAR = 3600.0, 365.25 * 24 * 3600


def render(text: str) -> str:
    """Return the document `text` with its blocks filled; raises ValueError when it lacks one."""
    scale = json.loads(RESULTS.read_text(encoding="utf-8"))
    encoders = json.loads(ENCODERS.read_text(encoding="utf-8"))
    blocks = {
        "encoders": encoders_table(encoders),
        "planet": planet_table(scale["photos"]),
        "groups": groups_table(scale["photos"]),
        "photos": photos_table(encoders),
        "machines": machines_table(encoders),
        "index": index_table(encoders, scale["land"]),
        "results": results_table(scale["photos"]),
        "ray": ray_table(scale["ray"]),
    }
    return filled(text, blocks, "docs/scale.md")


def per_core(encoders: Mapping[str, Any]) -> dict[str, float]:
    """Return the pictures a second and core of our encoders in results of `bench peers`, fastest first."""
    cores = encoders["machine"]["cores"]
    ran = [row for row in encoder_rows(encoders) if row["ours"] and "images_per_second" in row]
    ran.sort(key=lambda row: -row["images_per_second"])
    return {row["name"]: row["images_per_second"] / cores for row in ran}


def tiles_of_a_photo(indexed: int) -> int:
    """Return how many tiles a photo alone has encoded at k = 16, with an index down to a zoom."""
    first = 4 ** LEVELS[0] if indexed < LEVELS[0] else 0
    return first + sum(K * 16 for zoom in LEVELS[1:] if zoom > indexed)


def encoders_table(encoders: Mapping[str, Any]) -> str:
    """Return the speed of ViT-B/32 on a core, in pictures and in photos that share nothing."""
    rows = [
        [name, f"{rate:.1f}", f"{tiles_of_a_photo(0) / rate:,.0f} s"]
        for name, rate in per_core(encoders).items()
    ]
    return table(["encoder", "tiles a second and core", "one photo alone, k = 16"], rows)


def planet_table(photos: Mapping[str, Any]) -> str:
    """Return what was measured on the demo planet."""
    seconds = photos["core_seconds_per_photo"]
    rows = [[photos["count"], photos["k"], f"{seconds:.2f} s", hours(10**6 * seconds)]]
    return table(["photos", "k", "processor time of a photo", "of 10⁶ photos"], rows)


def groups_table(photos: Mapping[str, Any]) -> str:
    """Return how many tiles a photo costs in groups of several sizes."""
    alone = photos["tiles_per_photo"]["1"]
    rows = []
    for size, tiles in photos["tiles_per_photo"].items():
        best = photos["sorted_tiles_per_photo"][size]
        rows.append(
            [size, f"{tiles:,.0f}", f"{best:,.0f}", f"{1 - tiles / alone:.0%}", f"{1 - best / alone:.0%}"]
        )
    header = ["photos a search", "tiles a photo", "sorted by place", "saved", "saved, sorted"]
    return table(header, rows)


def photos_table(encoders: Mapping[str, Any]) -> str:
    """Return the core- and GPU-hours of photos that share nothing, by the deepest indexed zoom."""
    rate = max(per_core(encoders).values())
    rows = []
    for indexed in INDEXED:
        tiles = tiles_of_a_photo(indexed)
        row: list[object] = [f"4 to {indexed}" if indexed else "none", f"{tiles:,}"]
        for count in PHOTO_COUNTS:
            row.append(hours(count * tiles / rate))
            row += [hours(count * tiles / images) for images in GPU_IMAGES]
        rows.append(row)
    header = ["index", "tiles a photo"]
    for count in PHOTO_COUNTS:
        name = f"{power(count)}:"
        header += [f"{name} cores", *(f"{name} GPU at {images:,}/s" for images in GPU_IMAGES)]
    return table(header, rows)


def machines_table(encoders: Mapping[str, Any]) -> str:
    """Return how many machines do the photos in time: of 64 cores, and of 8 GPUs at the faster what-if."""
    rates = (CORES * max(per_core(encoders).values()), GPUS * GPU_IMAGES[-1])
    rows = [
        [
            f"4 to {indexed}" if indexed else "none",
            *(
                f"{math.ceil(count * tiles_of_a_photo(indexed) / rate / within):,}"
                for count, within in WITHIN_S.items()
                for rate in rates
            ),
        ]
        for indexed in INDEXED
    ]
    kinds = (f"{CORES} cores", f"{GPUS} GPUs at {GPU_IMAGES[-1]:,}/s")
    times = ("in 12 h", "in 30 days")
    named = [
        f"{power(count)} {time}: {kind}"
        for count, time in zip(WITHIN_S, times, strict=True)
        for kind in kinds
    ]
    return table(["index", *named], rows)


def index_table(encoders: Mapping[str, Any], land: Mapping[str, int]) -> str:
    """Return what indices of the land cost, each zoom for itself."""
    rate = max(per_core(encoders).values())
    rows = []
    for zoom, tiles in land.items():
        row = [
            zoom,
            f"{tiles:,}",
            size(tiles * (2 * WIDTH + 8)),
            size(tiles * TILE_BYTES),
            hours(tiles / rate),
        ]
        rows.append([*row, *(hours(tiles / images) for images in GPU_IMAGES)])
    header = ["zoom", "land tiles", "index", "pictures at 15 kB", "cores"]
    return table([*header, *(f"GPU at {images:,}/s" for images in GPU_IMAGES)], rows)


def results_table(photos: Mapping[str, Any]) -> str:
    """Return the size of results in each format."""
    rows = [
        [name, f"{own:,.0f} B", *(size(own * count) for count in PHOTO_COUNTS)]
        for name, own in photos["bytes"].items()
    ]
    return table(["format", "a photo", *map(power, PHOTO_COUNTS)], rows)


def ray_table(ray: Mapping[str, Any]) -> str:
    """Return the rates of one worker and of two, round by round."""
    rows = [
        [number, f"{one:.2f}", f"{two:.2f}", f"{two / one:.2f}"]
        for number, (one, two) in enumerate(zip(ray["rates"]["1"], ray["rates"]["2"], strict=True), start=1)
    ]
    rows.append(["median", "", "", f"{ray['ratio']:.2f}"])
    return table(["round", "photos a second, one worker", "two workers", "ratio"], rows)


def hours(seconds: float) -> str:
    """Return working time of one core or GPU in a unit that suits it."""
    for unit, scale in (("y", _YEAR), ("h", _HOUR), ("min", 60.0)):
        if seconds >= 1.5 * scale:
            return (
                f"{seconds / scale:,.1f} {unit}" if seconds < 10 * scale else f"{seconds / scale:,.0f} {unit}"
            )
    return f"{seconds:.2g} s"


def size(count: float) -> str:
    """Return bytes in a unit that suits them."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}" if count < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def power(count: int) -> str:
    """Return a power of ten as people write it."""
    exponents: Sequence[str] = "⁰¹²³⁴⁵⁶⁷⁸⁹"
    return f"10{exponents[len(str(count)) - 1]} photos"
