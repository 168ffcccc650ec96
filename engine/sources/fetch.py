"""Requests to one server: many at once, at its pace, again when they fail, and never a storm of them."""

from __future__ import annotations

import dataclasses
import email.utils
import importlib.util
import logging
import os
import queue
import random
import re
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

from geoengine.engine.errors import SourceError
from geoengine.engine.sources.description import SourceDescription
from geoengine.engine.sources.template import UrlTemplate, WithoutKeys

if TYPE_CHECKING:
    import httpcore

MISSING = frozenset({204, 404, 410})
"""Statuses that say that there is no such tile."""

_DONE = frozenset({200, 206}) | MISSING
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # worth another try
_BUSY = frozenset({429, 503})  # the whole host wants to be left alone for a while
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_MOST_BYTES = 32 << 20  # of an answer
_FIRST_ATTEMPTS = 3  # as long as nothing has ever come from the server
_FAILURES_IN_A_ROW = 8
_KEEP_ALIVE_S = 30.0

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered, and at which address; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str = ""


class UnusableError(Exception):
    """An answer that is not what was asked for, and may be the next time."""


class RefusedError(SourceError):
    """A server will not answer this request, however often it is asked; `status` is what it said."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Call:
    """What the requests of one `read` have met so far; `stopped` ends them."""

    def __init__(self, name: str) -> None:
        self.stopped = threading.Event()
        self._name = name
        self._lock = threading.Lock()
        self._answers = self._failures = self._in_a_row = 0
        self._last = ""

    def answered(self) -> None:
        """Count a tile that was answered for."""
        with self._lock:
            self._answers += 1
            self._in_a_row = 0

    def failed(self, what: str, reason: str) -> None:
        """Count a tile that counts as missing; raises SourceError when too many follow each other."""
        with self._lock:
            self._failures += 1
            self._in_a_row += 1
            self._last = f"{reason}, when asked for {what}"
            if self._in_a_row >= _FAILURES_IN_A_ROW:
                raise SourceError(f"{self._name}: the server fails: {self._last}")

    def finish(self) -> None:
        """Warn once of the tiles that failed; raises SourceError when all did."""
        if self._failures and not self._answers:
            raise SourceError(f"{self._name}: the server fails: {self._last}")
        if self._failures:
            _log.warning("%s: %d tiles count as missing: %s", self._name, self._failures, self._last)


class Fetcher:
    """Asks one server, with the patience and politeness of its description.

    Proxies come from the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY). HTTP/2 is spoken with
    servers that offer it. Threads may ask at the same time; `description.concurrency` requests run at once.
    """

    def __init__(self, description: SourceDescription, template: UrlTemplate) -> None:
        self._description = description
        self._template = template
        self._gate = _gate_of(template.host)
        self._answered = False
        own = {"User-Agent": user_agent(), "Accept": "image/*,*/*;q=0.1", "Accept-Encoding": "identity"}
        self._headers = own | template.headers
        self._own_names = frozenset(own)
        self._timeout = {
            "connect": description.connect_timeout_s,
            "read": description.read_timeout_s,
            "write": description.read_timeout_s,
            "pool": None,
        }
        self._connections = list(_connections(template, description.concurrency))
        # The one used last is used first, so that as few are opened as are needed.
        self._free: queue.LifoQueue[httpcore.ConnectionPool] = queue.LifoQueue()
        for connection in self._connections:
            self._free.put(connection)
        self._without_keys = WithoutKeys(template.secrets)
        self._without_keys.start()

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()
        self._without_keys.stop()

    def slow_down(self, rate_per_s: float) -> None:
        """Ask no more often than that from now on."""
        slowest = min(self._description.rate_per_s or rate_per_s, rate_per_s)
        self._description = dataclasses.replace(self._description, rate_per_s=slowest)

    def get(
        self,
        url: str,
        read: Callable[[Answer], T],
        *,
        what: str,
        call: Call,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> T | None:
        """Ask for `url` until `read` takes the answer, and return what it makes of it.

        `read` is given answers with one of the statuses 200, 206 and MISSING, and raises UnusableError to
        have the request made again. Returns None, after counting `what` as failed in `call`, when attempts
        run out, and when the call is stopped. Raises SourceError for refusals and servers out of reach.
        `content` makes it a POST.
        """
        reason, asked_wait_s, busy = "", 0.0, False
        most = self._description.attempts
        for attempt in range(most):
            if attempt and call.stopped.wait(max(self._backoff_s(attempt), asked_wait_s)):
                return None
            if not self._gate.wait(self._description.rate_per_s, call.stopped):
                return None
            answer, asked_wait_s, busy = self._ask(url, headers, content), 0.0, False
            if isinstance(answer, str):
                reason = answer
            elif answer.status in _DONE:
                try:
                    result = read(answer)
                except UnusableError as error:
                    reason = str(error)
                else:
                    self._answered = True
                    call.answered()
                    return result
            elif answer.status in _PASSING:
                reason = f"it answered HTTP {answer.status}"
                asked_wait_s, busy = self._asked_wait_s(answer), answer.status in _BUSY
            else:
                raise RefusedError(self._refusal(answer.status, what), answer.status)
            if not (self._answered or busy) and attempt + 1 >= min(_FIRST_ATTEMPTS, most):
                tries = f"{reason}, {attempt + 1} times, when asked for {what}"
                raise SourceError(f"{self._template.shown}: the server fails: {tries}")
        call.failed(what, f"{reason}, {most} times")
        return None

    def _ask(self, url: str, headers: Mapping[str, str] | None, content: bytes | None) -> Answer | str:
        """Make one request; returns the answer, or in words why there is none."""
        import httpcore

        connection = self._free.get()
        try:
            return self._exchange(connection, url, headers or {}, content)
        except httpcore.TimeoutException:
            return "it did not answer in time"
        except (httpcore.UnsupportedProtocol, UnicodeError):
            raise SourceError(f"{self._template.shown}: the template makes no valid request") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError):
            return "the connection broke" if self._answered else "it cannot be reached"
        finally:
            self._free.put(connection)

    def _exchange(
        self, connection: httpcore.ConnectionPool, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> Answer | str:
        import httpcore

        sent, first_host = self._headers | dict(headers), ""
        for _ in range(_MOST_REDIRECTS):
            scheme, host, target = _split(url)
            first_host = first_host or host
            if host != first_host:  # which must not see the keys of the first
                sent = {name: value for name, value in sent.items() if name in self._own_names}
            request = httpcore.Request(
                "GET" if content is None else "POST",
                _origin(scheme, host, target),
                headers=_encoded(sent, host, content),
                content=content,
                extensions={"timeout": self._timeout},
            )
            with closing(connection.handle_request(request)) as response:
                found: dict[str, str] = {}
                for name, value in _decoded(response.headers):
                    found[name] = f"{found[name]}, {value}" if name in found else value
                if response.status == 200 and "Range" in headers:
                    return Answer(200, found, b"")  # the whole file, which nobody wants
                if response.status not in _REDIRECTS or "location" not in found:
                    return self._answer(response, found, url)
            url = urljoin(url, found["location"])
        return "it redirects without end"

    def _answer(self, response: httpcore.Response, headers: Mapping[str, str], url: str) -> Answer | str:
        """Read the body, but not for ever."""
        late = time.monotonic() + 3 * self._description.read_timeout_s
        parts, length = [], 0
        for part in response.iter_stream():
            parts.append(part)
            length += len(part)
            if length > _MOST_BYTES:
                return "its answer has no end"
            if time.monotonic() > late:
                return "it did not answer in time"
        return Answer(response.status, headers, b"".join(parts), url)

    def _backoff_s(self, attempt: int) -> float:
        """Seconds to wait before an attempt; spread, so that the threads do not come back all at once."""
        longest = min(self._description.backoff_s * 2.0 ** (attempt - 1), self._description.longest_wait_s)
        return longest * random.uniform(0.5, 1)

    def _asked_wait_s(self, answer: Answer) -> float:
        wait_s = _retry_after_s(answer.headers.get("retry-after", ""))
        if wait_s > self._description.longest_wait_s:
            raise SourceError(
                f"{self._template.shown}: the server asks to wait for {wait_s:.0f} s; try later"
            )
        if answer.status in _BUSY:
            self._gate.pause(wait_s)
        return wait_s

    def _refusal(self, status: int, what: str) -> str:
        message = f"{self._template.shown}: the server answered HTTP {status} when asked for {what}; "
        if status not in (401, 403, 407):
            return message + "check the template"
        variables = " and ".join(self._template.variables)
        if variables:
            return message + f"check the key in the environment variable {variables}"
        return message + "if it wants a key, put it into the environment and {env:NAME} into the template"


class _Gate:
    """When the next request to a host may start, for all sources of the process that ask it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = self._paused_until = 0.0

    def wait(self, rate_per_s: float, stopped: threading.Event) -> bool:
        """Wait for a turn, of which there are at most `rate_per_s` a second, 0 for any; False if stopped."""
        with self._lock:
            turn = max(time.monotonic(), self._free_at)
            if rate_per_s:
                self._free_at = turn + 1 / rate_per_s
        while (delay := max(turn, self._paused_until) - time.monotonic()) > 0:
            if stopped.wait(delay):
                return False
        return not stopped.is_set()

    def pause(self, seconds: float) -> None:
        """Let no request start for so long."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)


_gates: weakref.WeakValueDictionary[str, _Gate] = weakref.WeakValueDictionary()
_gates_lock = threading.Lock()


def _gate_of(host: str) -> _Gate:
    with _gates_lock:
        gate = _gates.get(host)
        if gate is None:
            gate = _gates[host] = _Gate()
        return gate


def user_agent() -> str:
    """Return what servers are told asks them; GEOENGINE_CONTACT, a URL or address, becomes part of it."""
    contact = os.environ.get("GEOENGINE_CONTACT", "").strip()
    return f"geoengine/{version('geoengine')}" + (f" (+{contact})" if contact else "")


def _connections(template: UrlTemplate, count: int) -> Iterator[httpcore.ConnectionPool]:
    """Yield pools of one connection each, for one thread at a time.

    Threads that share an HTTP/2 connection of httpcore mix up its streams (pydantic/httpx2#1153), and a pool
    of 32 connections spends a third more time on its lock.
    """
    import certifi
    import httpcore

    proxy = _proxy_of(template)
    context = ssl.create_default_context()  # SSL_CERT_FILE and SSL_CERT_DIR are looked at
    context.load_verify_locations(certifi.where())
    http2 = importlib.util.find_spec("h2") is not None
    for _ in range(count):
        yield httpcore.ConnectionPool(
            ssl_context=context,
            proxy=proxy,
            http2=http2,
            max_connections=1,
            keepalive_expiry=_KEEP_ALIVE_S,
        )


def _split(url: str) -> tuple[str, str, str]:
    """Return a URL's scheme, host with port, and what is asked of the host."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return scheme, host, f"{slash or '/'}{path}".partition("#")[0]


def _origin(scheme: str, host: str, target: str) -> httpcore.URL:
    import httpcore

    name, _, port = host.rpartition(":") if re.search(r":\d+$", host) else (host, "", "")
    return httpcore.URL(
        scheme=scheme.encode(),
        host=name.strip("[]").encode("idna" if not name.isascii() else "ascii"),
        port=int(port) if port else None,
        target=target.encode("ascii"),
    )


def _encoded(headers: Mapping[str, str], host: str, content: bytes | None) -> list[tuple[bytes, bytes]]:
    sent = [(b"Host", host.encode("idna" if not host.isascii() else "ascii"))]
    sent += [(name.encode(), value.encode()) for name, value in headers.items()]
    return sent if content is None else [*sent, (b"Content-Length", str(len(content)).encode())]


def _decoded(headers: Sequence[tuple[bytes, bytes]]) -> Iterator[tuple[str, str]]:
    return ((name.decode().lower(), value.decode("latin-1")) for name, value in headers)


def _proxy_of(template: UrlTemplate) -> httpcore.Proxy | None:
    """Return the proxy that the environment names for a host."""
    import httpcore

    proxies = urllib.request.getproxies()
    proxy = proxies.get(template.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(template.host.replace("{s}", "a")):
        return None
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SourceError(f"{template.shown}: the proxy in the environment is not an http:// or https:// one")
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    return httpcore.Proxy(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", auth=auth)


def _retry_after_s(header: str) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or as a date; 0 for none."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
