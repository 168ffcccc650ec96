"""One engine for all requests: photos in from coroutines, searches on threads, tiles for the map."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from geoengine.engine.batching import KEPT_EMBEDDINGS, SharedEncoders
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import GeoEngineError, TileError
from geoengine.engine.index.known_rows import KnownRows
from geoengine.engine.index.memory_rows import MemoryRows
from geoengine.engine.index.tile_index import MANIFEST as INDEX_MANIFEST
from geoengine.engine.manifest import MANIFEST, PHOTO, encoder_name, model_name
from geoengine.engine.photos import Photo, PhotoLimits, read_photo
from geoengine.engine.results import Level, Location
from geoengine.engine.scoring.density import PRIORS, PriorError, open_prior
from geoengine.engine.scoring.kinds import Method
from geoengine.engine.search import SearchConfig, levels_of
from geoengine.engine.shared_search import SharedSearch
from geoengine.engine.sources import TileSource
from geoengine.engine.sources.nothing import NoTiles
from geoengine.engine.tiles import LEVELS, Tile
from geoengine.service.coarse import CoarseRegion, coarse_level, coarse_location, deepest_zoom
from geoengine.service.limits import Admission
from geoengine.service.metrics import Metrics
from geoengine.service.parameters import Offer, Parameters, check_work
from geoengine.service.problems import Problem, later
from geoengine.service.settings import Settings

_DECODERS = 2  # photos that are decoded at once: each may take hundreds of megabytes
_TILE_READERS = 4
_TILE_S = 20.0
_JPEG_QUALITY = 88
_NAME = "photo"  # what every photo is called: names of files tell more than their pixels

Progress = Callable[[int, int, int, int], None]


class Locator:
    """Opens the engine and searches with it; `close` ends what is under way."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self._metrics = settings, metrics
        self.engine = GeoEngine.open(
            settings.bundle,
            settings.tiles,
            backend=settings.backend,
            precision=settings.precision,
            threads=settings.threads,
            index=settings.index,
        )
        self.offer = Offer(
            levels=self._offered_levels(),
            methods=self._offered_methods(),
            priors=tuple(_priors(self.engine.bundle.world)),
            max_k=settings.max_k,
        )
        self.rows = self._keep_rows()
        self._warm_up()
        self.shared = SharedEncoders(
            self.engine.backend,
            kept=KEPT_EMBEDDINGS if self.engine.source.storable else 0,
            on_batch=metrics.batch,
        )
        self.admission = Admission(settings.searching, settings.waiting, settings.per_client)
        self._searchers = ThreadPoolExecutor(settings.searching, "geoengine-search")
        self._decoders = ThreadPoolExecutor(_DECODERS, "geoengine-decode")
        self._tile_readers = ThreadPoolExecutor(_TILE_READERS, "geoengine-tiles")
        self._limits = PhotoLimits(max_pixels=settings.max_pixels)
        self._under_way: set[SharedSearch] = set()
        metrics.watch(lambda: self.shared.state, self.admission, lambda: len(self.rows or ()))

    def _offered_methods(self) -> tuple[Method, ...]:
        """Return what may be asked, the usual one first; without map encoders or tiles, GeoCLIP alone."""
        bundle = self.engine.bundle
        if isinstance(self.engine.source, NoTiles) or not bundle.levels:
            return (Method.geoclip,)
        return tuple(Method) if bundle.has_geoclip else (Method.tiles,)

    def _offered_levels(self) -> tuple[int, ...]:
        """Return the levels that may be searched: those of encoders and tiles, no finer than is allowed."""
        searches = Method.tiles in self._offered_methods()
        levels = levels_of(self.engine.source, self.engine.bundle.levels if searches else LEVELS)
        offered = tuple(zoom for zoom in levels if zoom <= self.deepest)
        if not offered:
            raise GeoEngineError(
                f"--min-precision-km {self.settings.min_precision_km:g} leaves no level to search: "
                f"the coarsest is {levels[0]}; give fewer km"
            )
        return offered

    def _keep_rows(self) -> MemoryRows | None:
        """Let searches share the embeddings of tiles, where the terms of the tiles allow to keep them."""
        engine, width = self.engine, self.engine.bundle.embed_dim
        if not engine.source.storable:
            return None
        rows = MemoryRows(width, self.settings.rows_mb << 20)
        engine.known = KnownRows(width, None if engine.known is None else engine.known.index, rows)
        return rows

    def _warm_up(self) -> None:
        """Load every encoder, so that the first request does not wait for it, or fail: as full batches do."""
        backend, size = self.engine.backend, self.engine.bundle.image_size
        blank = [(PHOTO, np.zeros((1, size, size, 3), np.uint8))]
        if Method.tiles in self.offer.methods:
            levels, side = self.offer.levels, self.engine.source.tile_size
            tiles = np.zeros((-(-backend.batch // len(levels)), side, side, 3), np.uint8)
            blank += [(encoder_name(zoom), tiles) for zoom in levels]
        backend.encode_mixed(blank)
        if self.engine.bundle.has_geoclip:
            self.engine.geoclip()

    def close(self) -> None:
        """End all searches, and close the engine."""
        for search in tuple(self._under_way):
            search.cancel("the service is stopping")
        for pool in (self._searchers, self._decoders, self._tile_readers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.shared.close()
        self.engine.source.close()

    @property
    def deepest(self) -> int:
        """The deepest zoom that is shown and searched."""
        km = self.settings.min_precision_km
        return self.engine.source.max_zoom if km is None else deepest_zoom(km)

    @property
    def stalled(self) -> bool:
        """Whether a batch has been under way for too long."""
        return self.shared.state.busy_s > self.settings.stall_s

    def check(self) -> None:
        """Raise a problem when it is useless to begin a search now."""
        if self.stalled:
            raise later(503, "the encoders do not answer now: try again later", self.settings.stall_s)

    async def prepare(self, photo: bytearray, parameters: Parameters) -> tuple[Photo, SearchConfig]:
        """Read a photo and keep what the encoder sees; raises GeoEngineError for what cannot be done."""

        def work() -> tuple[Photo, SearchConfig]:
            config, km = parameters.config(self.offer), self.settings.min_precision_km
            if config.within is not None and km is not None:
                config = replace(config, within=CoarseRegion(config.within, km))
            self.engine.check_region(config.within)
            check_work(config, self.engine.source, self.settings.max_tiles)
            start = time.perf_counter()
            read = read_photo(bytes(photo), limits=self._limits, name=_NAME)
            prepared = self.engine.prepare(read, method=config.method)
            self._metrics.stage("decode", time.perf_counter() - start)
            return prepared, config

        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    async def locate(
        self,
        client: str,
        photo: Photo,
        config: SearchConfig,
        *,
        until: float,
        moved: Callable[[int], None] = lambda before: None,
        progress: Progress = lambda index, zoom, done, total: None,
        on_level: Callable[[Level], None] = lambda level: None,
    ) -> Location:
        """Wait for the client's turn and search; being cancelled ends the search.

        `until` is the end, a time of `time.monotonic`. `progress` and `on_level` are called on the search's
        thread. Raises a problem when there was no turn, or no answer, in time, and GeoEngineError.
        """
        start = time.monotonic()
        await self.admission.wait(client, until - start, moved)
        self._metrics.stage("wait", time.monotonic() - start)
        search = self.shared.search(client, until=until)
        try:
            running = asyncio.get_running_loop().run_in_executor(
                self._searchers, self._search, search, photo, config, progress, on_level
            )
        except BaseException:
            self.admission.done()
            raise
        self._under_way.add(search)
        running.add_done_callback(lambda done: self._ended(search, done, time.monotonic() - start))
        try:
            async with asyncio.timeout(until - time.monotonic() + 1):
                return await asyncio.shield(running)
        except TimeoutError:  # the thread is held up by something else than the encoders
            raise later(503, "the search did not end in time: try again later") from None
        finally:
            search.cancel("the client has left")

    def _ended(self, search: SharedSearch, done: asyncio.Future[Location], seconds: float) -> None:
        """Give the turn to the next one: only now is the search's thread free."""
        self._under_way.discard(search)
        if not done.cancelled() and done.exception() is None:
            self.admission.timed(seconds)
        self.admission.done()

    def _search(
        self,
        search: SharedSearch,
        photo: Photo,
        config: SearchConfig,
        progress: Progress,
        on_level: Callable[[Level], None],
    ) -> Location:
        mark, stage, km = time.perf_counter(), "embed", self.settings.min_precision_km

        def note(next_stage: str) -> None:
            nonlocal mark, stage
            now = time.perf_counter()
            self._metrics.stage(stage, now - mark)
            mark, stage = now, next_stage

        def progressed(index: int, zoom: int, done: int, total: int) -> None:
            search.check()
            if stage == "embed":
                note("level")
            progress(index, zoom, done, total)

        def ranked(row: int, level: Level) -> None:
            del row
            search.check()
            note("level")
            on_level(level if km is None else coarse_level(level, km))

        [location] = self.engine.using(search).locate(
            [photo], config=config, progress=progressed, on_level=ranked
        )
        return location if km is None else coarse_location(location, km)

    # --- the map -------------------------------------------------------------------------------------------

    async def tile(self, z: int, x: int, y: int) -> bytes:
        """Return a tile of the source as a JPEG; raises a 404 problem when there is none to be shown."""
        source = self.engine.source
        if not source.storable:
            raise Problem(404, unshown(source))
        try:
            tile = Tile(z, x, y)
        except TileError as error:
            raise Problem(404, str(error)) from None
        deepest = min(source.max_zoom, self.deepest)
        if not source.min_zoom <= z <= deepest:
            raise Problem(404, f"tiles are shown from zoom {source.min_zoom} to {deepest} here")
        reading = asyncio.get_running_loop().run_in_executor(self._tile_readers, self._read_tile, tile)
        try:
            async with asyncio.timeout(_TILE_S):
                return await reading
        except TimeoutError:
            raise later(503, "the map tile did not come in time: try again later") from None

    def _read_tile(self, tile: Tile) -> bytes:
        import cv2

        for batch in self.engine.source.read(tile.z, np.array([tile[1:]], dtype=np.int64)):
            picture = cv2.cvtColor(batch.pixels[0], cv2.COLOR_RGB2BGR)
            return bytes(cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY))[1])
        raise Problem(404, "the source has no such tile")

    # --- what is told of it --------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """Return what executes, what it has loaded, and how busy it is."""
        engine, state = self.engine, self.shared.state
        bundle, index = engine.bundle, None if engine.known is None else engine.known.index
        return {
            "backend": engine.backend.name,
            "device": _device(engine),
            "precision": str(engine.backend.variant),
            "bundle": {
                "hash": _sha256(bundle.path / MANIFEST),
                "weights": bundle.manifest.weights,
                "model": model_name(bundle.manifest),
                "world": bundle.world,
                "levels": list(self.offer.levels),
            },
            "index": None
            if index is None
            else {"hash": _sha256(index.path / INDEX_MANIFEST), "levels": list(index.description.complete)},
            "tiles": {"source": engine.source.name, "identity": engine.source.identity},
            "queue": {
                "searching": self.admission.searching,
                "waiting": self.admission.waiting,
                "pictures": state.waiting,
            },
            "encoder_busy_s": round(state.busy_s, 3),
            "encoder_failures": state.failures,
        }


def unshown(source: TileSource) -> str:
    """Return why a source's tiles are not shown, though they may be searched."""
    if isinstance(source, NoTiles):
        return "there are no map tiles here"
    return f"the terms of {source.name} do not allow to show its tiles"


def _priors(world: str) -> Iterator[str]:
    """Yield the names of the priors of a world."""
    for name in PRIORS:
        with contextlib.suppress(PriorError):
            open_prior(name, world)
            yield name


def _device(engine: GeoEngine) -> str:
    threads = getattr(engine.backend, "threads", None)
    if threads is not None:
        return f"CPU, {threads} threads"
    from geoengine.engine.backends.cuda import gpu_info

    return gpu_info().name


def _sha256(file: Any) -> str:  # noqa: ANN401 - a path
    return hashlib.sha256(file.read_bytes()).hexdigest()
