"""The application of one worker: routes, refusals, the page, and the life of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mimetypes
import os
import re
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, Response

from geoengine.service.api import Api
from geoengine.service.guard import Guard, Visit, broken
from geoengine.service.locator import Locator
from geoengine.service.metrics import Metrics
from geoengine.service.parameters import wrong_parameter
from geoengine.service.problems import MEDIA_TYPE, Problem
from geoengine.service.settings import Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp

STALLED_STATUS = 70
"""What a worker ends with when its encoders do not come back."""

_WATCH_S = 1.0
_HASHED = re.compile(r".*-[0-9A-Za-z_-]{8,}\.\w+")
_KINDS = {".mjs": "text/javascript", ".js": "text/javascript", ".woff2": "font/woff2"}

_log = logging.getLogger(__name__)


def create_app(settings: Settings, *, end: Callable[[int], None] = os._exit) -> ASGIApp:
    """Open the engine and return the application, whose end closes it; raises GeoEngineError.

    `end` is called when the encoders have stalled for too long: only a new process helps then.
    """
    metrics = Metrics()
    locator = Locator(settings, metrics)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        del app
        watching = asyncio.ensure_future(_watch(locator, end))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.to_thread(locator.close)

    app = FastAPI(
        title="geoengine",
        version=version("geoengine"),
        description="Find where a photo may have been taken. Answers are hypotheses, not proofs.",
        lifespan=life,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    for kind in (Problem, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _refused)
    app.include_router(Api(locator, metrics).router())
    app.add_api_route("/", _page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/static/{name:path}", _static, methods=["GET"], include_in_schema=False)
    return Guard(app, settings, metrics)


async def _refused(request: Request, error: Exception) -> Response:
    """Return the problem that an error is for the client."""
    match error:
        case Problem():
            problem = error
        case RequestValidationError():
            problem = wrong_parameter(error.errors())
        case HTTPException(status_code=404):
            problem = Problem(404, "there is nothing at this address: see /openapi.json")
        case HTTPException(status_code=405):
            problem = Problem(405, "not with this method: see /openapi.json", error.headers)
        case HTTPException():
            problem = Problem(error.status_code, "the request cannot be understood", error.headers)
        case _:
            problem = broken()
    visit: Visit = request.scope["geoengine.visit"]
    return Response(problem.encoded(visit.id), problem.status, problem.headers, MEDIA_TYPE)


async def _watch(locator: Locator, end: Callable[[int], None]) -> None:
    """End the worker when a batch has been under way for so long that it will not come back."""
    while True:
        await asyncio.sleep(_WATCH_S)
        busy_s = locator.shared.state.busy_s
        if busy_s > locator.settings.restart_s:
            _log.critical("a batch has been under way for %.0f s: this worker ends", busy_s)
            end(STALLED_STATUS)


async def _page() -> Response:
    page = _folder() / "index.html"
    if not page.is_file():
        return PlainTextResponse("geoengine is running: see /openapi.json for what it answers.\n")
    return FileResponse(page, media_type="text/html", headers={"Cache-Control": "no-cache"})


async def _static(name: str) -> Response:
    folder = _folder()
    file = (folder / name).resolve() if "\0" not in name else folder
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        raise HTTPException(404)
    kind = _KINDS.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    lasting = _HASHED.fullmatch(file.name) is not None
    headers = {"Cache-Control": "max-age=31536000, immutable" if lasting else "no-cache"}
    return FileResponse(file, media_type=kind, headers=headers)


def _folder() -> Path:
    return Path(str(files("geoengine.service"))) / "static"
