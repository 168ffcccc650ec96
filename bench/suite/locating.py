"""A process that locates photos and does nothing else, so that its memory and its time are the engine's."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.suite.network import ServedTiles, deaf
from geoengine.bench.suite.timing import peak_memory_mib
from geoengine.bench.suite.workload import PooledTiles, tile_pool
from geoengine.engine.backends import GPU_BACKENDS, Backend, EmbeddingRows
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.index.tile_index import TileIndex
from geoengine.engine.photos import Photo
from geoengine.engine.results import Level, Location
from geoengine.engine.search import SearchConfig
from geoengine.engine.sources import TileSource, open_source

PAUSE_AFTER_S = 1.0
"""A search is not interrupted before: those of a GPU never are."""

WARM_ROUNDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Which map tiles: those of a `spec`, or of a server's `port`, or else the suite's own on the disk."""

    spec: str | None = None
    port: int | None = None

    def open(self, world: str) -> TileSource:
        """Open them; raises SourceError."""
        if self.port is not None:
            return ServedTiles(self.port, world)
        return PooledTiles(tile_pool(), world) if self.spec is None else open_source(self.spec)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a process is to locate photos with; `folder` is for rows of tiles and is there."""

    bundle: Path
    tiles: Tiles
    backend: str
    precision: str | None
    k: int
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """What one photo took: `seconds` for `tiles` candidates with `distinct` pictures that were encoded."""

    seconds: float
    tiles: int
    distinct: int


Between = Callable[[float], None]
"""Called between two stretches of work, with the share of a photo's work that is done, 0 to 1."""


class Locator:
    """The other end of a process that `locating` started; `about` says what it runs."""

    def __init__(self, pipe: Connection, process: multiprocessing.process.BaseProcess, k: int) -> None:
        self._pipe, self._process, self._k = pipe, process, k
        self.about: dict[str, Any] = self._answer()

    def locate(self, photo: Photo, index: Path | None, between: Between) -> dict[str, Any]:
        """Locate a photo with nothing known, once more, and with an index; returns figures.

        `cold` and `indexed` are fields of `Times`, the latter None without an index; `warm` is seconds; and
        `point` is the answer's longitude and latitude. While `between` runs, the process waits and the time
        does not count. Raises GeoEngineError for what the engine raises, and when the process has died.
        """
        answer = self._ask((photo, index))
        while isinstance(answer, float):
            between(answer)
            answer = self._ask(None)
        return dict(answer)

    def peak_mib(self) -> float:
        """Return the most memory that the process has had resident, in MiB."""
        return float(self._ask(None))

    def _ask(self, what: tuple[Photo, Path | None] | None) -> Any:  # noqa: ANN401 - what the process sends
        with contextlib.suppress(ConnectionError):  # of a process that is gone, as `_answer` says
            self._pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:  # noqa: ANN401 - what the process sends
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise GeoEngineError(
                f"the process that locates photos at k={self._k} ended with status {self._process.exitcode}: "
                "if the system ran out of memory, leave out the largest k"
            ) from None
        if isinstance(answer, GeoEngineError):
            raise answer
        return answer


@contextmanager
def locating(order: Order) -> Iterator[Locator]:
    """Run a process that locates photos while the block runs; raises GeoEngineError when it cannot open."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(order, theirs), daemon=True)
    with deaf():
        process.start()
    theirs.close()
    try:
        yield Locator(ours, process, order.k)
    finally:
        ours.close()
        process.join(1)
        process.terminate()
        process.join()


def _run(order: Order, pipe: Connection) -> None:
    """Locate what comes through the pipe, until its other end is gone."""
    try:
        bundle = EngineBundle.open(order.bundle)
        with GeoEngine.open(
            order.bundle,
            order.tiles.open(bundle.world),
            backend=order.backend,
            precision=order.precision,
        ) as engine:
            _serve(_Photos(engine, order, pipe), pipe)
    except (EOFError, ConnectionError):
        pass  # nobody wants the rest
    except GeoEngineError as error:
        pipe.send(GeoEngineError(str(error)))


def _serve(photos: _Photos, pipe: Connection) -> None:
    pipe.send(photos.about())
    number = 0
    while (wanted := pipe.recv()) is not None:
        photo, index = wanted
        pipe.send(photos.locate(number, photo, index))
        number += 1
    pipe.send(peak_memory_mib())


class _Photos:
    """Locates photos in this process; the pipe's other end is asked for a pause now and then."""

    def __init__(self, engine: GeoEngine, order: Order, pipe: Connection) -> None:
        self._engine, self._order, self._pipe = engine, order, pipe
        self._config = SearchConfig(k=order.k, levels=engine.bundle.levels)
        self._encoded = _count_encoded(engine.backend)
        self._paused_s, self._resumed = 0.0, 0.0
        # Graphs are loaded, and on a GPU recorded for each size of batch, when they are first needed.
        on_gpu = engine.backend.name in GPU_BACKENDS
        warm_up = SearchConfig(k=order.k if on_gpu else 1, levels=engine.bundle.levels)
        engine.locate([np.zeros((engine.bundle.image_size,) * 2 + (3,), np.uint8)], config=warm_up)

    def about(self) -> dict[str, Any]:
        """Say what runs."""
        backend, source = self._engine.backend, self._engine.source
        return {
            "backend": backend.name,
            "precision": str(backend.variant),
            "on_gpu": backend.name in GPU_BACKENDS,
            "tiles": source.name,
        }

    def locate(self, number: int, photo: Photo, index: Path | None) -> dict[str, Any]:
        """Return the figures of one photo; see `Locator.locate`."""
        rows = self._order.folder / f"k{self._order.k}-{number}"
        half = 1.0 if index is None else 0.5
        cold, [location] = self._timed(self._with(row_cache=rows), photo, 0.0, half)
        again = self._with(row_cache=rows)
        warm = [self._again(again, photo, rows) for _ in range(1 + WARM_ROUNDS)]
        indexed = None
        if index is not None:
            times, _ = self._timed(self._with(index=TileIndex(index)), photo, half, 1.0)
            indexed = asdict(times)
        return {
            "cold": asdict(cold),
            "warm": statistics.median(warm[1:]),
            "indexed": indexed,
            "point": list(location.point),
        }

    def _with(self, *, index: TileIndex | None = None, row_cache: Path | None = None) -> GeoEngine:
        """Return an engine that knows other tiles, of the same encoders and tile source."""
        engine = self._engine
        return GeoEngine(engine.bundle, engine.source, engine.backend, index=index, row_cache=row_cache)

    def _timed(
        self, engine: GeoEngine, photo: Photo, before: float, after: float
    ) -> tuple[Times, list[Location]]:
        """Locate a photo, with pauses; `before` and `after` are the shares of its work that are done then."""
        levels = len(self._config.levels)

        def level_done(_: int, level: Level) -> None:
            if time.perf_counter() - self._resumed >= PAUSE_AFTER_S:
                done = self._config.levels.index(level.zoom) + 1
                self._pause(before + (after - before) * done / levels)

        encoded = self._encoded[0]
        start = self._resumed = time.perf_counter()
        self._paused_s = 0.0
        found = engine.locate([photo], config=self._config, on_level=level_done)
        seconds = time.perf_counter() - start - self._paused_s
        self._pause(after)
        tiles = sum(level.candidates for level in found[0].levels)
        return Times(seconds=seconds, tiles=tiles, distinct=self._encoded[0] - encoded), found

    def _pause(self, share: float) -> None:
        start = time.perf_counter()
        self._pipe.send(share)
        self._pipe.recv()
        self._resumed = time.perf_counter()
        self._paused_s += self._resumed - start

    def _again(self, engine: GeoEngine, photo: Photo, rows: Path) -> float:
        """Locate a photo all of whose tiles are known; raises GeoEngineError when they are not."""
        start = time.perf_counter()
        [location] = engine.locate([photo], config=self._config)
        seconds = time.perf_counter() - start
        if any(level.known < level.candidates for level in location.levels):
            raise GeoEngineError(
                f"{rows}: rows of tiles were not kept, of which nothing can be measured: make room there, or "
                "name another folder in TMPDIR"
            )
        return seconds


def _count_encoded(backend: Backend) -> list[int]:
    """Return a list whose only number grows by each picture that the backend is handed for a search."""
    counted, plain = [0], backend.rows

    def rows(encoder: str, capacity: int) -> EmbeddingRows:
        made = plain(encoder, capacity)
        append = made.append

        def count(pixels: NDArray[np.uint8], digests: Sequence[bytes] = ()) -> None:
            counted[0] += len(pixels)
            append(pixels, digests)

        made.append = count  # type: ignore[method-assign]
        return made

    backend.rows = rows  # type: ignore[method-assign]
    return counted
