"""The folder in which a bundle grows: a build that was interrupted is taken up again where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geoengine.engine.errors import ExportError

_KEY, _LOCK, _NOTES = "key", "lock", "notes.jsonl"


class Staging:
    """A hidden folder beside a bundle's own, for a build that `key` describes.

    What an earlier build with the same key left there is kept, anything else is removed. Nothing outside
    reads the folder until `finish` renames it.
    """

    def __init__(self, target: Path, key: str) -> None:
        self.path = staging_path(target)
        self._target = target
        if not (self.path / _KEY).is_file() or (self.path / _KEY).read_text(encoding="utf-8") != key:
            self._clear()
            (self.path / _KEY).write_text(key, encoding="utf-8")
        self._notes = self._read_notes()

    def noted(self, what: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON value
        """Return the JSON value of `work`, which an earlier build may have left under the name `what`."""
        if what not in self._notes:
            value = work()
            with (self.path / _NOTES).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"what": what, "value": value}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            self._notes[what] = value
        return self._notes[what]

    def finish(self) -> None:
        """Put the folder in the bundle's place; what was there goes only then."""
        from geoengine.export.encoders import replace_folder

        for name in (_KEY, _LOCK, _NOTES):
            (self.path / name).unlink(missing_ok=True)
        replace_folder(self.path, self._target)

    def discard(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def _read_notes(self) -> dict[str, Any]:
        notes: dict[str, Any] = {}
        file = self.path / _NOTES
        if file.is_file():
            whole = file.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]  # the last line may have been cut off
            file.write_bytes(whole)
            for line in whole.splitlines():
                note = json.loads(line)
                notes[note["what"]] = note["value"]
        return notes


def staging_path(target: Path) -> Path:
    """Return the folder in which the bundle `target` grows."""
    return target.parent / f".{target.name}.partial"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from building the bundle `target`; raises ExportError when one does already."""
    folder = staging_path(target)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(
                f"another build of {target} is running; wait for it, or name another folder"
            ) from None
        yield
