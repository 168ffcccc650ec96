"""The routes: locating a photo, its stages as events, map tiles, and how the service is."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import JSONResponse, Response

from geoengine.engine.errors import GeoEngineError
from geoengine.engine.manifest import model_name
from geoengine.engine.photos import Photo
from geoengine.engine.render.geojson import geojson_text
from geoengine.engine.render.json_lines import json_object, level_object
from geoengine.engine.results import HYPOTHESIS, Level, Location
from geoengine.engine.scoring.kinds import Score
from geoengine.engine.search import SearchConfig
from geoengine.engine.tiles import MAX_ZOOM
from geoengine.service import openapi
from geoengine.service.bodies import read_upload
from geoengine.service.events import ClientGone, EventStream, Tell, while_connected
from geoengine.service.guard import Visit
from geoengine.service.limits import Rate
from geoengine.service.locator import Locator, unshown
from geoengine.service.metrics import CONTENT_TYPE, Metrics
from geoengine.service.parameters import Parameters, parse_parameters
from geoengine.service.problems import Problem, problem_of

GEOJSON = "application/geo+json"
_TILES_PER_PHOTO = 40  # map tiles that a client may have for each photo of its rate
_PROGRESS_S = 0.25
_GONE = Response(status_code=499)  # nobody reads it


class Api:
    """The routes of one worker."""

    def __init__(self, locator: Locator, metrics: Metrics) -> None:
        self._locator, self._metrics = locator, metrics
        rate = locator.settings.rate_per_minute
        self._rate, self._tile_rate = Rate(rate), Rate(rate * _TILES_PER_PHOTO)
        self._started = time.monotonic()

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        add = router.add_api_route
        add("/v1/locate", self.locate, methods=["POST"], **openapi.LOCATE)
        add("/v1/locate/stream", self.stream, methods=["POST"], **openapi.STREAM)
        add("/v1/tiles/{z}/{x}/{y}", self.tile, methods=["GET"], **openapi.TILE)
        add("/v1/about", self.about, methods=["GET"], **openapi.ABOUT)
        add("/health", self.health, methods=["GET"], **openapi.HEALTH)
        add("/metrics", self.metrics, methods=["GET"], **openapi.METRICS)
        return router

    async def locate(self, request: Request, parameters: Annotated[Parameters, Query()]) -> Response:
        """Find where a photo may have been taken: a hypothesis, not a proof."""
        del parameters  # checked here, and again with those of the form
        as_geojson = _wants_geojson(request.headers.get("accept", "*/*"))
        async with AsyncExitStack() as stack:
            photo, config, until = await self._prepare(request, stack)
            searching = self._locator.locate(_visit(request).client, photo, config, until=until)
            try:
                location = await while_connected(request.receive, searching)
            except ClientGone:
                return _GONE
            except GeoEngineError as error:
                raise problem_of(error) from None
        if as_geojson:
            return Response(geojson_text([location]), media_type=GEOJSON)
        return JSONResponse(json_object(location))

    async def stream(self, request: Request, parameters: Annotated[Parameters, Query()]) -> Response:
        """Find where a photo may have been taken, and tell every stage of the search as it ends."""
        del parameters
        async with AsyncExitStack() as stack:
            photo, config, until = await self._prepare(request, stack)
            kept = stack.pop_all()  # the place in the queue, until the last event

        async def produce(tell: Tell) -> None:
            try:
                tell("result", json_object(await self._told(_visit(request), photo, config, until, tell)))
            except GeoEngineError as error:
                tell("error", problem_of(error).body(_visit(request).id))
            except Problem as problem:
                tell("error", problem.body(_visit(request).id))

        return EventStream(produce, kept.aclose)

    async def _prepare(self, request: Request, stack: AsyncExitStack) -> tuple[Photo, SearchConfig, float]:
        """Take a place in the queue, and read the photo and the parameters; raises a problem."""
        locator, client = self._locator, _visit(request).client
        settings, start = locator.settings, time.monotonic()
        self._rate.take(client)
        locator.check()
        await stack.enter_async_context(locator.admission.place(client))
        upload = await read_upload(request, max_bytes=settings.max_bytes, timeout_s=settings.body_s)
        self._metrics.stage("receive", time.monotonic() - start)
        chosen = parse_parameters(request.query_params.multi_items(), upload.parameters)
        try:
            photo, config = await locator.prepare(upload.photo, chosen)
        except GeoEngineError as error:
            raise problem_of(error) from None
        return photo, config, start + settings.deadline_s

    async def _told(
        self, visit: Visit, photo: Photo, config: SearchConfig, until: float, tell: Tell
    ) -> Location:
        """Search, and tell how far it is; the search's thread passes events on to the loop."""
        loop, last, count = asyncio.get_running_loop(), 0.0, len(config.levels)
        indexes: dict[int, int] = {}

        def progress(index: int, zoom: int, done: int, total: int) -> None:
            nonlocal last
            indexes[zoom] = index
            now = time.monotonic()
            if now - last >= _PROGRESS_S:
                last = now
                data = {"zoom": zoom, "index": index, "levels": count, "done": done, "total": total}
                loop.call_soon_threadsafe(tell, "progress", data)

        def on_level(level: Level) -> None:
            data = {"index": indexes.get(level.zoom, 0), "levels": count, **level_object(level)}
            loop.call_soon_threadsafe(tell, "level", data)

        before = -1

        def moved(now: int) -> None:
            nonlocal before
            if now != before:
                before = now
                tell("accepted", {"request": visit.id, "waiting": now})

        moved(self._locator.admission.waiting)
        return await self._locator.locate(
            visit.client, photo, config, until=until, moved=moved, progress=progress, on_level=on_level
        )

    async def tile(
        self,
        request: Request,
        z: Annotated[int, Path(ge=0, le=MAX_ZOOM)],
        x: Annotated[int, Path(ge=0, lt=1 << MAX_ZOOM)],
        y: Annotated[int, Path(ge=0, lt=1 << MAX_ZOOM)],
    ) -> Response:
        """Return a map tile of the source that is searched, for a map to show."""
        self._tile_rate.take(_visit(request).client)
        locator = self._locator
        try:
            jpeg = await locator.tile(z, x, y)
        except GeoEngineError as error:
            raise problem_of(error) from None
        credit = quote(locator.engine.source.attribution)
        headers = {"Cache-Control": "private, max-age=3600", "X-Attribution": credit}
        return Response(jpeg, media_type="image/jpeg", headers=headers)

    async def about(self) -> JSONResponse:
        """Return what this service searches, with which limits, and what it may be asked."""
        locator = self._locator
        settings, source, manifest = locator.settings, locator.engine.source, locator.engine.bundle.manifest
        shown = source.storable
        return JSONResponse(
            {
                "version": version("geoengine"),
                "world": source.world,
                "demo": source.world != "earth",
                "model": model_name(manifest),
                "note": HYPOTHESIS,
                "levels": list(locator.offer.levels),
                "defaults": Parameters(method=locator.offer.methods[0]).model_dump(
                    mode="json", exclude={"levels", "within"}
                ),
                "choices": {
                    "score": [str(score) for score in Score],
                    "method": [str(method) for method in locator.offer.methods],
                    "prior": list(locator.offer.priors),
                },
                "limits": {
                    "max_bytes": settings.max_bytes,
                    "max_pixels": settings.max_pixels,
                    "max_k": settings.max_k,
                    "max_top": settings.max_k,
                    "deadline_s": settings.deadline_s,
                    "min_precision_km": settings.min_precision_km,
                },
                "tiles": {
                    "url": "/v1/tiles/{z}/{x}/{y}",
                    "shown": shown,
                    "reason": "" if shown else unshown(source),
                    "min_zoom": source.min_zoom,
                    "max_zoom": min(source.max_zoom, locator.deepest),
                    "tile_size": source.tile_size,
                    "format": "image/jpeg",
                    "attribution": source.attribution,
                    "source": source.name,
                    "bounds": list(source.bounds),
                },
            }
        )

    async def health(self, request: Request) -> JSONResponse:
        """Tell whether the service can answer, and with what; without a needed key, only whether."""
        locator = self._locator
        failing = locator.shared.state.failing
        status = "stalled" if locator.stalled else "failing" if failing else "ok"
        told: dict[str, Any] = {"status": status, "version": version("geoengine")}
        if _visit(request).trusted:
            told |= locator.health() | {"uptime_s": round(time.monotonic() - self._started, 1)}
        return JSONResponse(told, status_code=200 if status == "ok" else 503)

    async def metrics(self) -> Response:
        """Return the figures of this worker as Prometheus reads them."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)


def _visit(request: Request) -> Visit:
    visit = request.scope["geoengine.visit"]
    assert isinstance(visit, Visit)
    return visit


def _wants_geojson(accept: str) -> bool:
    """Choose between JSON and GeoJSON by what the client accepts; raises a 406 problem when it is neither."""
    weights = {"application/json": -1.0, GEOJSON: -1.0}
    for part in accept.split(","):
        kind, *options = (piece.strip().lower() for piece in part.split(";"))
        weight = next((_weight(option[2:]) for option in options if option.startswith("q=")), 1.0)
        for offered in weights:
            if kind == offered or (kind in ("*/*", "application/*") and weights[offered] < 0):
                weights[offered] = weight
    if max(weights.values()) <= 0:
        raise Problem(406, f"answers are application/json or {GEOJSON}: accept one of them")
    return weights[GEOJSON] > weights["application/json"]


def _weight(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0
