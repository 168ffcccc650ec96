"""Where the tiles of a server are kept, for how long, and how many of them."""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from geoengine.engine.errors import SourceError
from geoengine.engine.sources.description import CachePolicy, SourceDescription

DEFAULT_LIMIT_BYTES = 4 << 30

_UNSTATED_AGE_S = 7 * 86400.0  # of tiles that come without a word on how long they may be kept


def keep_until(description: SourceDescription, headers: Mapping[str, str], *, missing: bool) -> float | None:
    """Return until when, by `time.time()`, a tile may be kept: inf for ever, None for not at all.

    `headers` are those of the answer, with names in lower case; see RFC 9111, 5.2 and 5.3.
    """
    now = time.time()
    if description.cache is CachePolicy.NONE:
        return None
    if missing:
        return now + description.missing_age_days * 86400 if description.missing_age_days else None
    if description.cache is CachePolicy.FOREVER:
        return float("inf")
    control = headers.get("cache-control", "").lower()
    if "no-store" in control or "no-cache" in control:
        return None
    stated = re.search(r"max-age\s*=\s*\"?(\d+)", control)
    if stated:
        age = headers.get("age", "")
        fresh_s = float(stated[1]) - (float(age) if age.isdecimal() else 0.0)
    elif "expires" in headers:
        fresh_s = _expires_at(headers["expires"]) - now
    else:
        fresh_s = _UNSTATED_AGE_S
    return now + fresh_s if fresh_s > 0 else None


def cache_file(name: str, identity: str) -> Path | None:
    """Return where the tiles of a source are kept, or None when GEOENGINE_CACHE is "off".

    That is in the folder GEOENGINE_CACHE or, by default, in the user's folder for caches.
    """
    chosen = os.environ.get("GEOENGINE_CACHE", "").strip()
    if chosen.lower() == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache"
    folder = Path(chosen).expanduser() if chosen else Path(base) / "geoengine" / "tiles"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    return folder / f"{slug}-{identity[:12]}.mbtiles"


def parse_size(text: str) -> int:
    """Return the bytes that a text such as 500MB, 4 GB or 1.5g means; raises SourceError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise SourceError(f"a size must be a number with a unit, such as 500MB or 4GB; got {text!r}")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def cache_limit_bytes() -> int:
    """Return the size above which a cache drops tiles: GEOENGINE_CACHE_LIMIT, or 4 GiB."""
    text = os.environ.get("GEOENGINE_CACHE_LIMIT", "").strip()
    return parse_size(text) if text else DEFAULT_LIMIT_BYTES


def _expires_at(header: str) -> float:
    try:
        return email.utils.parsedate_to_datetime(header).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
