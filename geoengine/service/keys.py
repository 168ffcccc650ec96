"""API keys: a file with the salted hash of each, one per line, read again whenever it changes."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import threading
from pathlib import Path

from geoengine.engine.errors import GeoEngineError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{8}):([0-9a-f]{32}):([0-9a-f]{64})", re.ASCII)
_KEY = re.compile(r"geoengine_([0-9a-f]{8})_([A-Za-z0-9_-]{43})", re.ASCII)
_NOBODY = ("", secrets.token_hex(16), secrets.token_hex(32))


def new_key(file: Path, name: str) -> str:
    """Make a key, add its hash to a file that only its owner can read, and return the key.

    A line is `name:id:salt:SHA-256`. The key holds 256 random bits, so that a fast hash gives nothing away;
    the id finds its line. Raises GeoEngineError for a name that is taken or cannot be one.
    """
    if _NAME.fullmatch(name) is None:
        raise GeoEngineError(
            f"{name!r} cannot be the name of a key: use up to 64 letters, digits, dots, hyphens, underscores"
        )
    if file.exists() and name in {name for name, _, _ in read_keys(file).values()}:
        raise GeoEngineError(f"{file} has a key of the name {name} already: remove its line, or use another")
    key_id, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_hex(16)
    line = f"{name}:{key_id}:{salt}:{_hashed(secret, salt)}\n"
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "ab+") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
            unended = stream.read(1) not in (b"", b"\n")  # an editor may have left the last line so
            stream.write((b"\n" if unended else b"") + line.encode("ascii"))
    except OSError as error:
        raise GeoEngineError(f"{file}: the key cannot be kept ({error.strerror or error})") from None
    return f"geoengine_{key_id}_{secret}"


def read_keys(file: Path) -> dict[str, tuple[str, str, str]]:
    """Return the keys of a file, id to (name, salt, hash); raises GeoEngineError naming a line that is none.

    Empty lines and those that begin with # count for nothing.
    """
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError) as error:
        raise GeoEngineError(f"{file}: the keys cannot be read ({error})") from None
    keys = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise GeoEngineError(
                f"{file}: line {number} is no key: write keys with `geoengine serve --new-key`"
            )
        keys[match[2]] = (match[1], match[3], match[4])
    return keys


class Keys:
    """The keys of a file, as it is now."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self._stamp, self._keys = self._stamped(), read_keys(file)

    def owner(self, key: str) -> str | None:
        """Return the name of a key's owner, None for what is no key; takes as long for a wrong one."""
        self._refresh()
        match = _KEY.fullmatch(key)
        key_id, secret = match.groups() if match else ("", "")
        name, salt, expected = self._keys.get(key_id, _NOBODY)
        right = hmac.compare_digest(_hashed(secret, salt), expected)
        return name if right and match else None

    def _refresh(self) -> None:
        """Read the file again if it has changed; one that cannot be read leaves no key valid."""
        with self._lock:
            stamp = self._stamped()
            if stamp != self._stamp:
                try:
                    self._keys = read_keys(self._file)
                except GeoEngineError:
                    self._keys = {}
                self._stamp = stamp

    def _stamped(self) -> tuple[int, int, int]:
        try:
            stat = self._file.stat()
        except OSError:
            return (0, 0, 0)
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _hashed(secret: str, salt: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode("ascii")).hexdigest()
