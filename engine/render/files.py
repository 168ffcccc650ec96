"""Writing an output file so that it is either complete or not there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from geoengine.engine.errors import GeoEngineError


class OutputError(GeoEngineError):
    """An output file cannot be written."""


def check_writable(path: Path) -> None:
    """Raise OutputError when a file at `path` could not be written; meant for before a long search."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"{path}: no permission to write there")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to a temporary file beside `path`, then rename it.

    On any failure, an interrupt included, the temporary file is removed and an older file at `path` is left
    as it was. Raises OutputError when the system refuses.
    """
    import secrets

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
