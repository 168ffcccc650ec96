"""What stands before every route: who may ask, what every response carries, and what is noted of it."""

from __future__ import annotations

import logging
import secrets
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from geoengine.service.keys import Keys
from geoengine.service.metrics import Metrics
from geoengine.service.problems import MEDIA_TYPE, Problem
from geoengine.service.settings import LOOPBACK_HOSTS, Settings

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; worker-src 'self'; font-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}

_PROTECTED = ("/v1/", "/metrics")
_GUARDED = (*_PROTECTED, "/health", "/openapi.json")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Visit:
    """One request: its id, on whose account it is, and whether that one may see how the service is."""

    id: str
    client: str = ""
    trusted: bool = False


class Guard:
    """Wraps an application; see the module.

    A log line has an id, the route, the status and the time, and nothing that the client has sent.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._keys = None if settings.keys is None else Keys(Path(settings.keys))
        self._hosts = {host.lower() for host in settings.allowed_hosts}
        if self._keys is None:
            self._hosts |= {*LOOPBACK_HOSTS, settings.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(secrets.token_hex(8))
        scope["geoengine.visit"] = visit
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-ID"] = visit.id
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._admit(scope, visit)
            await self._app(scope, receive, answer)
        except Problem as problem:
            await refuse(problem, visit.id, answer)
        except Exception as error:
            _log.error("request=%s failed: %s", visit.id, where(error))
            if not status:
                await refuse(broken(), visit.id, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - start
            self._metrics.request(route, status, seconds)
            told = (visit.id, _method(scope), route, status or "gone", seconds * 1e3)
            _log.info("request=%s %s %s status=%s ms=%.0f", *told)

    def _admit(self, scope: Scope, visit: Visit) -> None:
        """Find out who asks; raises a problem for who may not."""
        path, headers = scope["path"], Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts and _hostname(f"//{host}") not in self._hosts:
            # A page of another site may have given its own name this address (DNS rebinding).
            raise Problem(403, "this service does not answer to that host name: see --allow-host")
        if path.startswith(_GUARDED):
            origin = headers.get("origin")
            foreign = origin is not None and not self._own(origin, host)
            if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                raise Problem(403, "pages of other sites may not use this service")
        address = scope.get("client")
        visit.client, visit.trusted = (address[0] if address else "local"), self._keys is None
        if self._keys is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is not None:
            visit.client, visit.trusted = f"key {owner}", True
        elif path.startswith(_PROTECTED):
            raise Problem(
                401,
                "a key is needed: send it as Authorization: Bearer KEY",
                {"WWW-Authenticate": 'Bearer realm="geoengine"'},
            )

    def _own(self, origin: str, host: str) -> bool:
        hostname = _hostname(origin) if "://" in origin else ""
        return bool(hostname) and (urlsplit(origin).netloc == host or hostname in self._hosts)


async def refuse(problem: Problem, visit: str, send: Send) -> None:
    """Send a problem as the response."""
    body = problem.encoded(visit)
    headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), **problem.headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def broken() -> Problem:
    """Return what is told of a fault of our own."""
    return Problem(500, "the service has failed at this request: its log says where")


def where(error: BaseException) -> str:
    """Return an error's type and the places it came through; its text may hold what the client has sent."""
    frames = traceback.extract_tb(error.__traceback__)
    return type(error).__name__ + "".join(f" < {f.name} ({f.filename}:{f.lineno})" for f in reversed(frames))


def _method(scope: Scope) -> str:
    method = scope["method"]
    return method if method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
