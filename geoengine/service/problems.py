"""Refusals: every one has a status and one plain sentence (RFC 9457)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from geoengine.engine.errors import (
    BackendError,
    BundleError,
    GeoEngineError,
    PhotoError,
    PhotoKindError,
    PhotoSizeError,
    SourceError,
)
from geoengine.engine.shared_search import SearchEndedError

MEDIA_TYPE = "application/problem+json"
RETRY_S = 5
"""Seconds after which to try again what failed for a reason that will pass."""


class Problem(Exception):
    """A request that is refused; `headers` go into the response."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})

    def body(self, request: str) -> dict[str, Any]:
        """Return the object that is sent; `request` is the request's id."""
        return {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "request": request,
        }

    def encoded(self, request: str) -> bytes:
        """Return the body's bytes."""
        return json.dumps(self.body(request)).encode()


def later(status: int, detail: str, seconds: float = RETRY_S) -> Problem:
    """Return a problem that passes, with `Retry-After`."""
    return Problem(status, detail, {"Retry-After": str(max(1, round(seconds)))})


def problem_of(error: GeoEngineError) -> Problem:
    """Return what a client is told when reading a photo or searching fails; no path of this machine."""
    match error:
        case PhotoSizeError():
            return Problem(413, f"{error}; send a smaller picture")
        case PhotoKindError():
            return Problem(415, str(error))
        case PhotoError():
            return Problem(422, str(error))
        case SearchEndedError():
            return later(503, f"{error}: try again later, or with a smaller k or fewer levels")
        case BackendError() | BundleError():
            return later(503, "the encoders cannot run now: try again later")
        case SourceError():
            return later(503, "the map tiles did not come: try again later")
    return Problem(422, str(error))
