"""What each stage of a search costs, and how far that is from what this machine could do at best.

One photo is located over local tiles with nothing known before, and a clock around the engine's seams counts
every stage: see `stage_clock`. Searches without the clock take turns with those under it. A resize inside the
trunk has no seam: its share is that by which the encoder is slower for tiles as they come than for tiles of
its own size, in turns. Limits are bytes over the measured speed of memory, tiles over that of the decoder,
and operations of the graphs' matrix products over the fastest measured products of that precision.
"""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from geoengine.bench.readme import percent, table
from geoengine.bench.suite import limits
from geoengine.bench.suite import stage_clock as clocks
from geoengine.bench.suite.results import Progress, Results
from geoengine.bench.suite.stage_clock import StageClock, watched
from geoengine.bench.suite.timing import Spread
from geoengine.bench.suite.waterfall import Bar, waterfall
from geoengine.bench.suite.workload import PooledTiles, drawn_photos, resolve_bundle, tile_pool
from geoengine.engine.backends import GPU_BACKENDS, check_choice, try_backends
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import BackendError, GeoEngineError
from geoengine.engine.manifest import encoder_name
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import TileSource, open_source

Document: TypeAlias = dict[str, Any]

GOAL = 0.10
"""The share of a cold search that all stages but the encoder may take together."""

ENCODER = (clocks.PREPROCESS, clocks.TRUNK, clocks.HEAD)
_SEED = 5
_PAIRS = 5  # rounds of the encoder with tiles as they come and in its own size


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSettings:
    """What is measured: beam width, backends ("auto": the first to run; "all"), and what is in it.

    Raises GeoEngineError.
    """

    k: int = 16
    backends: tuple[str, ...] = ("all",)
    precision: str | None = None
    bundle: str | None = None
    tiles: str | None = None
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.k < 1 or self.rounds < 1:
            raise GeoEngineError(f"k and rounds must be at least 1, got {self.k} and {self.rounds}")
        for backend in self.backends:
            check_choice("auto" if backend == "all" else backend, self.precision)

    @property
    def benchmark(self) -> str:
        """The name of the file of results."""
        return "stages"

    def to_dict(self) -> dict[str, Any]:
        """Return them JSON-ready."""
        return asdict(self)


def measure(settings: StageSettings, results: Results, progress: Progress) -> None:
    """Add a row for each backend; raises GeoEngineError when none can run, or the bundle or tiles cannot."""
    if settings.tiles is not None:
        open_source(settings.tiles).close()  # what is none is refused before encoders are built
    bundle = EngineBundle.open(
        resolve_bundle(settings.bundle, lambda done, total, what: progress(what, done, total))
    )
    for name in _backends(bundle, settings):
        if results.known(name):
            continue
        with GeoEngine.open(
            bundle.path, _tiles(settings, bundle), backend=name, precision=settings.precision
        ) as engine:
            results.add(name, **_measured(engine, settings, progress))


def _backends(bundle: EngineBundle, settings: StageSettings) -> list[str]:
    if "auto" not in settings.backends and "all" not in settings.backends:
        return list(settings.backends)
    found, reasons = [], []
    for name, opened in try_backends(bundle, precision=settings.precision):
        if isinstance(opened, BackendError):
            reasons.append(f"{name}: {opened}")
            continue
        opened.close()
        found.append(name)
        if "all" not in settings.backends:
            break
    if not found:
        raise BackendError(f"no backend can run engine bundle {bundle.path}: {'; '.join(reasons)}")
    return found


def _tiles(settings: StageSettings, bundle: EngineBundle) -> TileSource:
    if settings.tiles is not None:
        return open_source(settings.tiles)
    return PooledTiles(tile_pool(), bundle.world)


def _measured(engine: GeoEngine, settings: StageSettings, progress: Progress) -> dict[str, Any]:
    """Return the figures of one backend."""

    def say(what: str) -> None:
        progress(f"{engine.backend.name}: {what}", 0, None)

    config = SearchConfig(k=settings.k, levels=engine.bundle.levels)
    gpu = engine.backend.name in GPU_BACKENDS
    [photo] = drawn_photos(1, _SEED)
    say("loading graphs")
    _load(engine)
    say("limits")
    rates = limits.measure_limits(engine.backend.variant, _sample(engine.source), gpu=gpu)
    unwatched, clocked = [], []
    for number in range(settings.rounds):
        say(f"searching, round {number + 1} of {settings.rounds}")
        start = time.perf_counter()
        engine.locate([photo], config=config)
        unwatched.append(time.perf_counter() - start)
        clock = StageClock()
        with watched(engine, clock), clock.search():
            engine.locate([photo], config=config)
        clocked.append(clock)
    say("the resize in the graph")
    resize = _resize_share(engine, clocked[0].sides, gpu)
    own = [_stages(clock, gpu=gpu, resize=resize) for clock in clocked]
    middle = sorted(range(len(own)), key=lambda row: own[row]["total_s"])[(len(own) - 1) // 2]
    figures = own[middle]
    _add_limits(figures["stages"], engine, rates, clocked[middle])
    return {
        "backend": engine.backend.name,
        "variant": str(engine.backend.variant),
        "k": settings.k,
        "cold_s": Spread.of(unwatched).to_dict(),
        "watched_s": Spread.of([clock.whole_s for clock in clocked]).to_dict(),
        "resize_share_of_encoder": resize,
        "limits": rates,
        **figures,
    }


def _load(engine: GeoEngine) -> None:
    """Load all graphs, which are otherwise loaded when they are first needed."""
    side, size = engine.source.tile_size or engine.bundle.image_size, engine.bundle.image_size
    engine.backend.encode("photo", np.zeros((1, size, size, 3), np.uint8))
    for encoder in map(encoder_name, engine.bundle.levels):
        engine.backend.encode(encoder, np.zeros((engine.backend.batch, side, side, 3), np.uint8))


def _sample(source: TileSource) -> list[bytes]:
    """Return the bytes of some tiles; of drawn JPEG pictures where the source does not hand out bytes."""
    archive: Any = source._pool if isinstance(source, PooledTiles) else source
    if hasattr(archive, "tile_data"):
        zoom = max(archive.min_zoom, 4)
        found = [archive.tile_data(zoom, x, y) for x in range(1 << zoom)[:16] for y in range(1 << zoom)[:16]]
        tiles = [data for data in found if isinstance(data, bytes)]
        if tiles:
            return tiles[:64]
    with closing(PooledTiles(tile_pool(), "earth")) as pool:
        return _sample(pool)


def _resize_share(engine: GeoEngine, sides: set[int], gpu: bool) -> float:
    """Return the share of the encoder's time by which it is slower for tiles than for its own size."""
    size, side = engine.bundle.image_size, max(sides, default=0)
    if side in (0, size):
        return 0.0
    rng = np.random.default_rng(_SEED)
    pictures = {s: rng.integers(0, 256, (engine.backend.batch, s, s, 3), np.uint8) for s in (size, side)}
    encoder = encoder_name(engine.bundle.levels[-1])
    clock = time.perf_counter if gpu else time.process_time
    shares = []
    for number in range(1 + _PAIRS):
        times = {}
        for own, pixels in pictures.items():
            start = clock()
            engine.backend.encode(encoder, pixels)
            times[own] = clock() - start
        if number:
            shares.append(1 - times[size] / times[side])
    return min(max(statistics.median(shares), 0.0), 1.0)


def _stages(clock: StageClock, *, gpu: bool, resize: float) -> dict[str, Any]:
    """Return each stage's seconds: of the processor, or on a GPU of the clock where it is waited for.

    `waits_s` is what the answering thread spends in it, and its sum with `waiting_s` is `watched_whole_s`.
    """
    busy, waits = clock.processor_s.copy(), clock.wall_s.copy()
    made_s = busy.pop(clocks.MADE, 0.0)
    busy[clocks.BOOKKEEPING] += busy.pop(clocks.WAITING, 0.0)
    waiting_s = waits.pop(clocks.WAITING, 0.0)
    if gpu:
        for stage in (clocks.TRUNK, clocks.HEAD, clocks.TOP_K, clocks.COPY):
            busy[stage] = max(busy[stage], waits[stage])
    else:
        # What no thread of Python did, the encoder's own threads did.
        native = max(0.0, clock.whole_processor_s - sum(clock.processor_s.values()))
        inside = waits[clocks.TRUNK] + waits[clocks.HEAD] or 1.0
        for stage in (clocks.TRUNK, clocks.HEAD):
            busy[stage] += native * waits[stage] / inside
    for account in (busy, waits):
        part = min(resize * (account[clocks.TRUNK] + account[clocks.HEAD]), account[clocks.TRUNK])
        account[clocks.PREPROCESS] += part
        account[clocks.TRUNK] -= part
    calls = {**clock.calls, clocks.PREPROCESS: clock.calls[clocks.PREPROCESS] or clock.calls[clocks.TRUNK]}
    return {
        "stages": {
            stage: {"calls": calls.get(stage, 0), "busy_s": busy[stage], "waits_s": waits[stage]}
            for stage in clocks.STAGES
        },
        "encoded": clock.tiles[clocks.TRUNK],
        "total_s": sum(busy.values()),
        "waiting_s": waiting_s,
        "whole_s": clock.whole_s,
        "made_s": made_s,
        "but_encoder_busy": 1 - sum(busy[stage] for stage in ENCODER) / sum(busy.values()),
        "but_encoder_waits": 1 - sum(waits[stage] for stage in ENCODER) / (sum(waits.values()) + waiting_s),
    }


def _add_limits(
    stages: dict[str, dict[str, Any]], engine: GeoEngine, rates: dict[str, Any], clock: StageClock
) -> None:
    """Add to each stage the seconds it would take at best, and what of."""
    count, side = clock.tiles[clocks.TRUNK], max(clock.sides, default=0)
    size = engine.bundle.image_size
    bytes_of, memory, host = clock.bytes, rates["memory"], rates["host_memory"]
    best = {
        clocks.FETCH: (bytes_of[clocks.FETCH] / rates["reading"], "bytes over the speed of reading"),
        clocks.DECODE: (clock.tiles[clocks.DECODE] / rates["decoding"], "tiles over OpenCV's speed"),
        clocks.COPY: (2 * bytes_of[clocks.COPY] / host, "bytes over the speed of memory"),
        clocks.DIGEST: (bytes_of[clocks.DIGEST] / host, "bytes over the speed of memory"),
        clocks.TOP_K: (bytes_of[clocks.TOP_K] / memory, "bytes over the speed of memory"),
    }
    if side != size or clock.calls[clocks.PREPROCESS]:
        moved = 3 * (engine.source.tile_size**2 + size**2) * count
        best[clocks.PREPROCESS] = (moved / memory, "bytes over the speed of memory")
    for stage, flop in _flop(engine, side).items():
        if rates["products"]:
            stages[stage]["gflop_per_picture"] = flop / 1e9
            best[stage] = (count * flop / rates["products"], "FLOP over the speed of matrix products")
    for stage, (seconds, what) in best.items():
        stages[stage] |= {"limit_s": seconds, "limit": what}


def _flop(engine: GeoEngine, side: int) -> dict[str, int]:
    """Return the operations of trunk and head for one picture; nothing where they cannot be counted."""
    bundle, variant = engine.bundle, engine.backend.variant
    trunk = bundle.trunk_path(side, variant)
    head = bundle.head_path(encoder_name(bundle.levels[-1]), variant)
    try:
        return {
            clocks.TRUNK: limits.graph_flop(Path(trunk or ""))[limits.MODEL],
            clocks.HEAD: limits.graph_flop(head)[limits.MODEL],
        }
    except (ImportError, OSError):
        return {}


def utilisation(row: dict[str, Any]) -> float | None:
    """Return the share of the fastest matrix products' speed that the encoder reaches (MFU)."""
    stages = row["stages"]
    if any("limit_s" not in stages[stage] for stage in (clocks.TRUNK, clocks.HEAD)):
        return None
    at_best = stages[clocks.TRUNK]["limit_s"] + stages[clocks.HEAD]["limit_s"]
    return float(at_best / sum(stages[stage]["busy_s"] for stage in ENCODER))


def tables(document: Document) -> str:
    """Return the figures as Markdown: for each backend its stages."""
    parts = [_backend_text(row) for row in document["rows"]]
    return "\n".join(parts) if parts else "Nothing measured yet.\n"


def _backend_text(row: dict[str, Any]) -> str:
    gpu = row["limits"]["per"] == "second"
    unit = "s" if gpu else "processor s"
    header = [
        "stage",
        "calls",
        unit,
        "share",
        "waited for, s",
        "share",
        f"limit, {unit}",
        "limit is",
        "reached",
    ]
    lines = [_line(stage, row) for stage in clocks.STAGES]
    share = percent(row["waiting_s"] / row["whole_s"])
    lines.append([clocks.WAITING, "", "", "", f"{row['waiting_s']:.3f}", share, "", "", ""])
    total = f"{row['total_s']:.3f}"
    lines.append(["whole", "", total, "100 %", f"{row['whole_s']:.3f}", "100 %", "", "", ""])
    mfu = utilisation(row)
    products = row["limits"]["products"]
    said = [
        f"## {row['backend']}, {row['variant']}: one photo, k={row['k']}, nothing known",
        "",
        f"{row['encoded']} pictures encoded; {row['cold_s']['median']:.2f} s without the clock "
        f"({row['cold_s']['least']:.2f} to {row['cold_s']['most']:.2f}), "
        f"{row['watched_s']['median']:.2f} s under it.",
        table(header, lines),
    ]
    if mfu is not None:
        said.append(
            f"Model FLOP utilisation of the encoder: {percent(mfu)} of {products / 1e9:,.0f} GFLOP per "
            f"{row['limits']['per']} ({row['limits']['products_of']}, {row['limits']['precision']})."
        )
    else:
        said.append("Model FLOP utilisation: not installed: pip install 'geoengine[export]'.")
    verdict = "met" if row["but_encoder_busy"] <= GOAL else "missed"
    said.append(
        f"All stages but the encoder: {percent(row['but_encoder_busy'])} of the "
        f"{'time' if gpu else 'processor time'} and {percent(row['but_encoder_waits'])} of what is waited "
        f"for (goal: at most {percent(GOAL)}; {verdict})."
    )
    if row["made_s"]:
        said.append(f"Left out: {row['made_s']:.2f} s in which the benchmark makes its tiles differ.")
    return "\n".join(said) + "\n"


def _line(stage: str, row: dict[str, Any]) -> list[str]:
    own = row["stages"][stage]
    limit = own.get("limit_s")
    return [
        stage,
        f"{own['calls']:,}",
        f"{own['busy_s']:.3f}",
        percent(own["busy_s"] / row["total_s"]),
        f"{own['waits_s']:.3f}",
        percent(own["waits_s"] / row["whole_s"]),
        "" if limit is None else f"{limit:.3f}",
        own.get("limit", ""),
        "" if not limit or not own["busy_s"] else percent(limit / own["busy_s"]),
    ]


def key_figures(document: Document) -> dict[str, str]:
    """Return the few figures by which machines are compared."""
    figures = {}
    for row in document["rows"]:
        name = f"{row['backend']} {row['variant']}, k={row['k']}"
        figures[f"{name}, all but the encoder"] = percent(row["but_encoder_busy"])
        mfu = utilisation(row)
        if mfu is not None:
            figures[f"{name}, encoder's FLOP utilisation"] = percent(mfu)
    return figures


def plots(document: Document) -> dict[str, str]:
    """Return a waterfall for each backend, SVG texts by name."""
    return {f"stages-{row['backend']}": _waterfall(row) for row in document["rows"]}


def _waterfall(row: dict[str, Any]) -> str:
    unit = "seconds" if row["limits"]["per"] == "second" else "processor seconds"
    stages = row["stages"]
    bars = [Bar(stage, stages[stage]["busy_s"], stages[stage].get("limit_s")) for stage in clocks.STAGES]
    title = f"One photo, k={row['k']}, nothing known: {row['backend']}, {row['variant']}"
    return waterfall(title, bars, unit)
