"""Tiles from a web server, asked for with a URL template."""

import email.utils
import logging
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from urllib.parse import parse_qsl, quote, urlsplit

import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import WORLD_BOUNDS, TileBatch, fingerprint
from geoengine.engine.sources.decode import DEFAULT_TILE_SIZE, Job, Picture, read_picture, stream
from geoengine.engine.tiles import MAX_ZOOM, Tile, as_xy, quadkey, tms_row

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_PLACEHOLDERS = {"z", "x", "y", "-y", "s", "quadkey"}
_KNOWN = "{z}, {x}, {y}, {-y}, {quadkey}, {s} and {env:NAME}"
_MISSING = frozenset({204, 404, 410})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # worth another try
_FAILURES_IN_A_ROW = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpSettings:
    """How a tile server is asked: zooms that it has, patience, and politeness.

    `contact` is a URL or e-mail address for the User-Agent, by which the operators of the server can reach
    whoever runs the search; many servers demand one.
    """

    min_zoom: int = 0
    max_zoom: int = MAX_ZOOM
    attribution: str = ""
    contact: str = ""
    concurrency: int = 16
    attempts: int = 5
    backoff_s: float = 0.5  # before the second attempt; doubled before each further one
    longest_wait_s: float = 60.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_zoom <= self.max_zoom <= MAX_ZOOM:
            raise ValueError(f"zooms {self.min_zoom} to {self.max_zoom} are not a range in [0, {MAX_ZOOM}]")
        if min(self.concurrency, self.attempts) < 1:
            raise ValueError("concurrency and attempts must be at least 1")
        if min(self.backoff_s, self.longest_wait_s, self.connect_timeout_s, self.read_timeout_s) < 0:
            raise ValueError("times must not be negative")


class HttpSource:
    """A web server's tiles, fetched in threads.

    `template` is a URL with {z}, {x} and {y} ({-y} for rows counted from the south) or {quadkey} in it, {s}
    for the subdomains a, b and c, and {env:NAME} for a key, which is then taken from the environment and
    shown nowhere.

    A tile for which the server answers 404, 410, 204 or nothing, or what is not a picture, is missing.
    Answers that pass (429, 5xx, lost connections) are retried with exponential backoff and jitter, or when
    Retry-After says. A tile for which that fails too is missing, with one warning; when eight tiles in a row
    fail, or all of a request, the source is out of reach and SourceError is raised, as it is for any other
    answer.

    The tiles' side is that of the first tile that arrives; before, 256 is assumed. Raises SourceError for a
    template that cannot be used.
    """

    world = "earth"
    storable = True
    bounds = WORLD_BOUNDS

    def __init__(self, template: str, settings: HttpSettings | None = None) -> None:
        import httpx

        self._settings = settings or HttpSettings(contact=os.environ.get("GEOENGINE_CONTACT", ""))
        self._template = _UrlTemplate(template)
        self.name = self._template.shown
        self.attribution = self._settings.attribution
        self.min_zoom, self.max_zoom = self._settings.min_zoom, self._settings.max_zoom
        self.identity = fingerprint("http", self._template.shown)
        self.tile_size = DEFAULT_TILE_SIZE
        self._first_tile_seen = False
        contact = f" (+{self._settings.contact})" if self._settings.contact else ""
        self._client = httpx.Client(
            headers={"User-Agent": f"geoengine/{version('geoengine')}{contact}", "Accept": "image/*"},
            timeout=httpx.Timeout(
                self._settings.read_timeout_s, connect=self._settings.connect_timeout_s, pool=None
            ),
            limits=httpx.Limits(max_connections=self._settings.concurrency),
            follow_redirects=True,
        )
        self._without_keys = _WithoutKeys(self._template.secrets)
        logging.getLogger("httpx").addFilter(self._without_keys)

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles of the request that the server has; those it had no answer for are missing."""
        tiles = [Tile(z, x, y) for x, y in as_xy(z, xy).tolist()]
        if not self._settings.min_zoom <= z <= self._settings.max_zoom:
            return
        tally = _Tally(self.name)
        jobs: Iterator[tuple[int, Job]] = (
            (position, partial(self._fetch, tile, tally)) for position, tile in enumerate(tiles)
        )
        try:
            yield from stream(jobs, workers=self._settings.concurrency, tile_size=self._side)
        finally:
            tally.stopped.set()
        tally.finish()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        logging.getLogger("httpx").removeFilter(self._without_keys)

    def _side(self, picture: Picture) -> int:
        if not self._first_tile_seen:
            self.tile_size, self._first_tile_seen = picture.shape[1], True
        return self.tile_size

    def _fetch(self, tile: Tile, tally: "_Tally") -> Picture | None:
        import httpx

        url = self._template.url(tile)
        reason, asked_wait_s = "", 0.0
        for attempt in range(self._settings.attempts):
            if attempt and tally.stopped.wait(max(self._backoff_s(attempt), asked_wait_s)):
                return None
            try:
                response = self._client.get(url)
            except httpx.TimeoutException:
                reason, asked_wait_s = "it did not answer in time", 0.0
                continue
            except httpx.RequestError:
                reason, asked_wait_s = "it cannot be reached", 0.0
                continue
            except httpx.InvalidURL:
                raise SourceError(f"{self.name}: the template makes no valid URL for tile {tile}") from None
            if response.status_code == 200 or response.status_code in _MISSING:
                tally.answered()
                return read_picture(response.content) if response.status_code == 200 else None
            if response.status_code not in _PASSING:
                raise SourceError(self._refusal(response.status_code, tile))
            reason = f"it answered HTTP {response.status_code}"
            asked_wait_s = _retry_after_s(response.headers.get("Retry-After", ""))
            if asked_wait_s > self._settings.longest_wait_s:
                raise SourceError(f"{self.name}: the server asks to wait for {asked_wait_s:.0f} s; try later")
        tally.failed(tile, f"{reason}, {self._settings.attempts} times")
        return None

    def _backoff_s(self, attempt: int) -> float:
        """Seconds to wait before an attempt; spread, so that the threads do not come back all at once."""
        longest = min(self._settings.backoff_s * 2.0 ** (attempt - 1), self._settings.longest_wait_s)
        return longest * random.uniform(0.5, 1)

    def _refusal(self, status: int, tile: Tile) -> str:
        message = f"{self.name}: the server answered HTTP {status} when asked for tile {tile}; "
        if status not in (401, 403):
            return message + "check the template"
        variables = " and ".join(self._template.variables)
        if variables:
            return message + f"check the key in the environment variable {variables}"
        return message + "if it wants a key, put it into the environment and {env:NAME} into the template"


class _UrlTemplate:
    """A URL with placeholders; `shown` is the part that may be shown: no query, user name or password."""

    def __init__(self, text: str) -> None:
        used = set(_PLACEHOLDER.findall(text))
        self.variables = sorted(name[4:] for name in used if name.startswith("env:"))
        try:
            parts = urlsplit(text)
            port = f":{parts.port}" if parts.port else ""
            if not parts.hostname:
                raise ValueError("no host")
        except ValueError:
            raise SourceError("the tile source's URL template is no valid URL") from None
        self.shown = f"{parts.scheme}://{parts.hostname}{port}{parts.path}"
        unknown = sorted(used - _PLACEHOLDERS - {f"env:{name}" for name in self.variables})
        if unknown:
            raise SourceError(f"{self.shown}: {{{unknown[0]}}} is no placeholder; there are {_KNOWN}")
        if not ("quadkey" in used or ({"z", "x"} <= used and used & {"y", "-y"})):
            raise SourceError(f"{self.shown}: a URL template needs {{z}}, {{x}} and {{y}}, or {{quadkey}}")
        self._text = text
        self._keys = {f"env:{name}": _key(name, self.shown) for name in self.variables}
        typed = [parts.password or "", *(value for _, value in parse_qsl(parts.query))]
        self.secrets = [*self._keys.values(), *(v for v in typed if len(v) >= 8 and "{" not in v)]

    def url(self, tile: Tile) -> str:
        """Return the URL of a tile."""
        values = self._keys | {
            "z": str(tile.z),
            "x": str(tile.x),
            "y": str(tile.y),
            "-y": str(tms_row(tile)),
            "s": "abc"[(tile.x + tile.y) % 3],
            "quadkey": quadkey(tile),
        }
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self._text)


def _key(variable: str, shown: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise SourceError(f"{shown}: the environment variable {variable}, which it needs, is not set")
    return quote(value, safe="/:,;=@~%")


class _Tally:
    """What one request for tiles has met so far, told by all its threads."""

    def __init__(self, name: str) -> None:
        self.stopped = threading.Event()
        self._name = name
        self._lock = threading.Lock()
        self._answers = self._failures = self._in_a_row = 0
        self._last = ""

    def answered(self) -> None:
        with self._lock:
            self._answers += 1
            self._in_a_row = 0

    def failed(self, tile: Tile, reason: str) -> None:
        with self._lock:
            self._failures += 1
            self._in_a_row += 1
            self._last = f"{reason}, when asked for tile {tile}"
            if self._in_a_row >= _FAILURES_IN_A_ROW:
                raise SourceError(f"{self._name}: the tile server fails: {self._last}")

    def finish(self) -> None:
        if self._failures and not self._answers:
            raise SourceError(f"{self._name}: the tile server fails: {self._last}")
        if self._failures:
            _log.warning("%s: %d tiles count as missing: %s", self._name, self._failures, self._last)


class _WithoutKeys(logging.Filter):
    """Takes keys out of httpx's log, which has a line with the URL of each request."""

    def __init__(self, secrets: list[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        for secret in self._secrets:
            message = message.replace(secret, "***")
        record.msg, record.args = message, ()
        return True


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
