"""Writing an output file so that it is either complete or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

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
    """Write `text` as UTF-8, as `writing` does."""
    with writing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for the block, then rename it.

    On any failure, an interrupt included, the temporary file is removed and an older file at `path` is left
    as it was. Raises OutputError when the system refuses.
    """
    import secrets

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(file: Path, busy: str, error: type[GeoEngineError] = OutputError) -> Iterator[None]:
    """Hold the lock of a file, which is made, for the block; it ends with the process at the latest.

    Raises `error` with the text `busy` when another process holds it, or when it cannot be had.
    """
    import fcntl

    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as refused:
        raise error(f"{file.parent}: cannot be written ({refused.strerror or refused})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(busy) from None
        except OSError as refused:
            raise error(f"{file}: cannot be locked ({refused.strerror or refused})") from None
        yield
    finally:
        os.close(descriptor)
