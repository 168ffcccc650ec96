"""URL templates of tile servers: placeholders for the address of a tile, and for keys that nobody may see."""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import fingerprint
from geoengine.engine.tiles import Tile, quadkey, tms_row

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_OF_THE_TILE = frozenset({"z", "x", "y", "-y", "s", "quadkey"})
_KNOWN = "{z}, {x}, {y}, {-y}, {quadkey}, {s} and {env:NAME}"
_KEY_NAMES = re.compile(r"key|token|secret|sig|password|auth|session|appid", re.IGNORECASE)
_KEY_LENGTH = 8  # a shorter value that somebody typed into a query is not worth hiding
_AS_THEY_ARE = "%/:=&?~#+!$,;'@()*[]{}|"  # characters of a template that need no quoting, or have it
_LOGGERS = (
    *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy")),
    *("hpack.hpack", "hpack.table"),  # which log each header, and with HTTP/2 the path is one
)


class UrlTemplate:
    """A URL, and headers, with placeholders; `shown` is the part that may be shown.

    That is no query, user name or password, and the names of keys instead of the keys. `variables` are the
    environment variables that the keys come from, `secrets` whatever must never be seen. `values` stand for
    further placeholders; they are secrets too. Raises SourceError for a template that cannot be used.
    """

    def __init__(
        self,
        text: str,
        *,
        subdomains: Sequence[str] = ("a", "b", "c"),
        headers: Mapping[str, str] | None = None,
        values: Mapping[str, str] | None = None,
    ) -> None:
        try:
            parts = urlsplit(text)
            port = f":{parts.port}" if parts.port else ""
            if not parts.hostname or parts.scheme not in ("http", "https"):
                raise ValueError("no host")
        except ValueError:
            raise SourceError("the tile source's URL template is no valid URL") from None
        self.scheme, self.host = parts.scheme, f"{parts.hostname}{port}"
        self.shown = f"{parts.scheme}://{self.host}{parts.path}"
        query = f"?{parts.query}" if parts.query else ""
        self._subdomains = subdomains
        written = "".join((text, *(headers or {}).values()))
        self.used = set(_PLACEHOLDER.findall(written))
        self.variables = sorted(name[4:] for name in self.used if name.startswith("env:"))
        self._keys = {f"env:{name}": _key(name, self.shown) for name in self.variables} | dict(values or {})
        unknown = sorted(self.used - _OF_THE_TILE - set(self._keys))
        if unknown:
            raise SourceError(f"{self.shown}: {{{unknown[0]}}} is no placeholder; there are {_KNOWN}")
        self._parts = _PLACEHOLDER.split(quote(f"{self.shown}{query}", safe=_AS_THEY_ARE))
        self._places = [(index, self._parts[index]) for index in range(1, len(self._parts), 2)]
        self.headers = {
            name: _PLACEHOLDER.sub(lambda found: self._keys.get(found[1], found[0]), value)
            for name, value in (headers or {}).items()
        }
        if any(not name.isascii() or not text.isprintable() for name, text in self.headers.items()):
            raise SourceError(f"{self.shown}: a header has characters that cannot be sent")
        if parts.username:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        typed = parse_qsl(parts.query)
        self.secrets = _seen_forms(
            [
                *self._keys.values(),
                *(value for name, value in self.headers.items() if _KEY_NAMES.search(name)),
                parts.password or "",
                *(value for _, value in typed if len(value) >= _KEY_LENGTH and "{" not in value),
            ]
        )
        telling = (f"{name}={value}" for name, value in typed if not _KEY_NAMES.search(name))
        self.identity = fingerprint("http", self.shown, *telling)

    @property
    def is_archive(self) -> bool:
        """Whether the URL is that of one PMTiles archive, not of a tile."""
        return self.shown.lower().endswith(".pmtiles") and not self.used & _OF_THE_TILE

    def check_address(self) -> None:
        """Raise SourceError unless the URL differs from tile to tile."""
        if not ("quadkey" in self.used or ({"z", "x"} <= self.used and self.used & {"y", "-y"})):
            raise SourceError(f"{self.shown}: a URL template needs {{z}}, {{x}} and {{y}}, or {{quadkey}}")

    def url(self, tile: Tile | None = None) -> str:
        """Return the URL of a tile, or the URL as it is when it has no tile in it."""
        parts = self._parts.copy()
        for index, name in self._places:
            parts[index] = self._value(name, tile)
        return "".join(parts)

    def _value(self, name: str, tile: Tile | None) -> str:
        if name in self._keys:
            return self._keys[name]
        assert tile is not None
        if name in ("z", "x", "y"):
            return str(getattr(tile, name))
        if name == "-y":
            return str(tms_row(tile))
        return quadkey(tile) if name == "quadkey" else self._subdomains[sum(tile[1:]) % len(self._subdomains)]


class WithoutKeys(logging.Filter):
    """Takes keys out of what the HTTP libraries log, from `start` to `stop`."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__()
        self._secrets = [secret for secret in secrets if secret]

    def start(self) -> None:
        """Begin to look at log records."""
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self)

    def stop(self) -> None:
        """Leave the loggers as they were."""
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace keys in the record's text."""
        message = record.getMessage()
        for secret in self._secrets:
            message = message.replace(secret, "***")
        record.msg, record.args = message, ()
        return True


def _key(variable: str, shown: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise SourceError(f"{shown}: the environment variable {variable}, which it needs, is not set")
    return quote(value, safe="/:,;=@~%")


def _seen_forms(secrets: Sequence[str]) -> list[str]:
    """Return secrets in every form in which a log might show them, the longest first."""
    forms = {form for secret in secrets if secret for form in (secret, unquote(secret), repr(secret)[1:-1])}
    return sorted(forms, key=len, reverse=True)
