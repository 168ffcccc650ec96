"""A clock for the stages of a search, put around the engine's seams from outside while a search runs.

The stages of one search overlap: tiles are read and decoded in threads of their own while others are
encoded. So there are two accounts. The processor's has each stage's work, wherever it is done; the wall
clock's has what the thread that answers spends in a stage, and how long it waits for tiles. Both are
exclusive: what a stage calls of another one is only in the other's, so each account adds up to the whole.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from geoengine.bench.suite.workload import PooledTiles
from geoengine.engine import pictures
from geoengine.engine.backends import GPU_BACKENDS, OPENVINO, batches
from geoengine.engine.engine import GeoEngine
from geoengine.engine.preprocess import to_square
from geoengine.engine.readahead import ReadAhead
from geoengine.engine.sources import TileSource, streaming
from geoengine.engine.sources.archive import ArchiveSource
from geoengine.engine.sources.decode import read_picture
from geoengine.engine.sources.decoders import tile_decoder

FETCH, DECODE, COPY, DIGEST = "fetch", "decode", "copy", "digest"
PREPROCESS, TRUNK, HEAD, TOP_K, BOOKKEEPING = "preprocess", "trunk", "head", "top-k", "bookkeeping"
STAGES = (FETCH, DECODE, COPY, DIGEST, PREPROCESS, TRUNK, HEAD, TOP_K, BOOKKEEPING)

WAITING = "waiting for tiles"
MADE = "made for the benchmark"
"""What is no stage: the answering thread's wait, and the work of the tiles that are made up here."""

_ANSWERING = "search"


class StageClock:
    """Seconds of each stage, its calls, and what went through it.

    `wall_s` is of the thread that answers alone, `processor_s` of all threads of Python. `whole_s` and
    `whole_processor_s` are of the search; what the latter has more are threads of the encoder's own.
    """

    def __init__(self) -> None:
        self.wall_s: defaultdict[str, float] = defaultdict(float)
        self.processor_s: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.tiles: Counter[str] = Counter()
        self.sides: set[int] = set()  # of the pictures that the trunk took
        self.whole_s = self.whole_processor_s = 0.0
        self._lock = threading.Lock()
        self._of_thread = threading.local()

    @contextmanager
    def search(self) -> Iterator[None]:
        """Time a whole search in this thread."""
        start_processor = time.process_time()
        with self.stage(BOOKKEEPING, thread=_ANSWERING):
            start = self._of_thread.since
            yield
        self.whole_s += self._of_thread.since - start
        self.whole_processor_s += time.process_time() - start_processor

    @contextmanager
    def stage(self, name: str, *, thread: str | None = None) -> Iterator[None]:
        """Count the time in the block to a stage; `thread` says what this thread is, if nobody has yet.

        Nothing is counted in threads of which that was not said.
        """
        own = self._of_thread
        if not getattr(own, "stack", None):
            if thread is None:
                yield
                return
            own.stack, own.name = [], thread
        self._charge()
        own.stack.append(name)
        try:
            yield
        finally:
            self._charge()
            own.stack.pop()

    def count(self, name: str, size: int = 0, tiles: int = 1) -> None:
        """Count a call of a stage, and what it had to do."""
        with self._lock:
            self.calls[name] += 1
            self.bytes[name] += size
            self.tiles[name] += tiles

    def _charge(self) -> None:
        """Count the time since the last change to what this thread is doing."""
        own = self._of_thread
        now, processor = time.perf_counter(), time.thread_time()
        if own.stack:
            with self._lock:
                self.processor_s[own.stack[-1]] += processor - own.processor
                if own.name == _ANSWERING:
                    self.wall_s[own.stack[-1]] += now - own.since
        own.since, own.processor = now, processor


@contextmanager
def watched(engine: GeoEngine, clock: StageClock) -> Iterator[None]:
    """Have the clock count what an engine does in the block; nothing else may use the engine meanwhile."""
    with ExitStack() as stack:
        for target, name, replacement in _seams(engine, clock):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield


def _seams(engine: GeoEngine, clock: StageClock) -> Iterator[tuple[object, str, object]]:
    yield from _source_seams(engine.source, clock)
    yield ReadAhead, "_run", _beginning(clock, ReadAhead._run, "reading ahead")
    yield ReadAhead, "take", _timed(clock, WAITING, ReadAhead.take)
    yield (
        streaming._Work,
        "run",
        _tile_job(clock, streaming._Work.run, counted=not _is_archive(engine.source)),
    )
    yield streaming, "read_picture", _timed(clock, DECODE, read_picture)
    yield streaming._Staging, "put", _timed(clock, COPY, streaming._Staging.put, _picture_bytes)
    decoder = tile_decoder()
    batched = _timed(clock, DECODE, decoder.decode, tiles_of=lambda tiles: len(tiles))
    yield decoder, "decode", batched
    digest = _timed(clock, DIGEST, hashlib.sha256, lambda picture: picture.nbytes)
    yield pictures, "hashlib", SimpleNamespace(sha256=digest)
    yield batches, "to_square", _timed(clock, PREPROCESS, to_square)
    yield engine.backend, "rows", _rows(clock, engine.backend.rows)
    if engine.backend.name in GPU_BACKENDS:
        yield from _gpu_seams(engine.backend, clock)
    elif engine.backend.name == OPENVINO:
        yield from _openvino_seams(engine.backend, clock)
    else:
        yield engine.backend, "_run", _graph_run(clock, engine.backend)


def _source_seams(source: Any, clock: StageClock) -> Iterator[tuple[object, str, object]]:  # noqa: ANN401
    if isinstance(source, PooledTiles):
        yield source, "read", _iterated(clock, MADE, source.read)
        source = source._pool
        yield source, "read", _iterated(clock, BOOKKEEPING, source.read)
    if _is_archive(source):
        yield source, "tile_data", _timed(clock, FETCH, source.tile_data, result_size=_length)


def _timed(
    clock: StageClock,
    name: str,
    call: Callable[..., Any],
    size: Callable[..., int] | None = None,
    *,
    result_size: Callable[[Any], int] | None = None,
    tiles_of: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - those of the call
        with clock.stage(name):
            result = call(*arguments, **options)
        moved = 0 if size is None else size(*arguments)
        moved += 0 if result_size is None else result_size(result)
        clock.count(name, moved, 1 if tiles_of is None else tiles_of(*arguments))
        return result

    return timed


def _beginning(clock: StageClock, call: Callable[..., None], thread: str) -> Callable[..., None]:
    def beginning(*arguments: Any) -> None:  # noqa: ANN401
        with clock.stage(BOOKKEEPING, thread=thread):
            call(*arguments)

    return beginning


def _tile_job(clock: StageClock, run: Callable[..., None], *, counted: bool) -> Callable[..., None]:
    def timed(work: object, position: int, job: Callable[[], object]) -> None:
        def fetched() -> object:
            with clock.stage(FETCH):
                found = job()
            if counted:
                clock.count(FETCH, _length(getattr(found, "data", None)))
            return found

        with clock.stage(BOOKKEEPING, thread="tiles"):
            run(work, position, fetched)

    return timed


def _iterated(clock: StageClock, name: str, read: Callable[..., Iterable[Any]]) -> Callable[..., Any]:
    """Time what a generator does itself, and not what is done with what it yields."""

    def timed(*arguments: Any) -> Iterator[Any]:  # noqa: ANN401
        iterator = iter(read(*arguments))
        while True:
            with clock.stage(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    return timed


def _rows(clock: StageClock, rows: Callable[..., Any]) -> Callable[..., Any]:
    def timed(encoder: str, capacity: int) -> Any:  # noqa: ANN401 - EmbeddingRows
        made = rows(encoder, capacity)
        made.top_k = _timed(clock, TOP_K, made.top_k, _scored_bytes)
        return made

    return timed


def _graph_run(clock: StageClock, backend: Any) -> Callable[..., Any]:  # noqa: ANN401 - a HostBackend
    run = backend._run

    def timed(path: Path, *arguments: Any) -> Any:  # noqa: ANN401
        stage = _counted(clock, arguments[-1])
        with clock.stage(stage):
            return run(path, *arguments)

    return timed


def _openvino_seams(backend: Any, clock: StageClock) -> Iterator[tuple[object, str, object]]:  # noqa: ANN401
    """Time starting graphs and waiting for them: streams run side by side, each waited for in turn."""
    start, wait = backend._start, backend._wait
    stages: dict[Path, str] = {}

    def started(path: Path, request: Any, value: Any) -> None:  # noqa: ANN401
        stages[path] = _counted(clock, value)
        with clock.stage(stages[path]):
            start(path, request, value)

    def waited(path: Path, request: Any) -> None:  # noqa: ANN401
        with clock.stage(stages[path]):
            wait(path, request)

    yield backend, "_start", started
    yield backend, "_wait", waited


def _counted(clock: StageClock, value: Any) -> str:  # noqa: ANN401 - an array
    """Count what a graph is given, and return its stage: a trunk takes pixels."""
    stage = TRUNK if value.dtype == np.uint8 else HEAD
    if stage == TRUNK:
        clock.sides.add(value.shape[1])
    clock.count(stage, value.nbytes, len(value))
    return stage


def _gpu_seams(backend: Any, clock: StageClock) -> Iterator[tuple[object, str, object]]:  # noqa: ANN401
    """Time copies to the GPU and the encoders there, waiting for each: trunk and head together."""
    feed = backend._feed
    encode, load = feed._encode_into, feed._staging.load

    def loaded(pixels: Any) -> Any:  # noqa: ANN401
        with clock.stage(COPY):
            there = load(pixels)
            feed.cuda.synchronize(feed.stream)
        clock.count(COPY, pixels.nbytes, 0)
        return there

    def encoded(pixels: Any, runs: Any, address: int) -> None:  # noqa: ANN401
        clock.sides.add(pixels.shape[1])
        with clock.stage(TRUNK):
            encode(pixels, runs, address)
            feed.cuda.synchronize(feed.stream)
        clock.count(TRUNK, tiles=pixels.shape[0])

    yield feed, "_encode_into", encoded
    yield feed._staging, "load", loaded


def _is_archive(source: TileSource) -> bool:
    """Tell whether tiles are read in the thread that reads ahead; other sources read them in jobs."""
    return isinstance(source, PooledTiles | ArchiveSource)


def _length(data: object) -> int:
    return len(data) if isinstance(data, bytes) else 0


def _picture_bytes(staging: object, position: int, picture: Any) -> int:  # noqa: ANN401
    return int(picture.nbytes)


def _scored_bytes(queries: Any, k: int, rows: Any, segments: Any) -> int:  # noqa: ANN401
    return int(len(rows) * queries.shape[1] * 4)
