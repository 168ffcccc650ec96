"""The folder in which a bundle grows: a build that was interrupted is taken up again where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from geoengine.engine.backends.plans import FOLDER
from geoengine.engine.bundle import GEOCLIP, EngineBundle
from geoengine.engine.errors import BundleError, ExportError
from geoengine.engine.manifest import MANIFEST

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
        self._synced: dict[Path, tuple[int, int]] = {}

    def noted(self, what: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON value
        """Return the JSON value of `work`, which an earlier build may have left under the name `what`."""
        if what not in self._notes:
            value = work()
            self._sync()
            with (self.path / _NOTES).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"what": what, "value": value}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            self._notes[what] = value
        return self._notes[what]

    def finish(self) -> None:
        """Put the folder in the bundle's place; what was there goes only then.

        Until the folder is in its place, it is one that the same build can take up again.
        """
        from geoengine.export.encoders import replace_folder

        self._sync()
        replace_folder(self.path, self._target)
        for name in (_KEY, _NOTES, _LOCK):
            (self._target / name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder with all that is in it."""
        self._clear()
        (self.path / _LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # another build may have begun in it since the lock went
            self.path.rmdir()

    def _sync(self) -> None:
        """Have the disk keep what was written since the last time: a note must not outlive its files."""
        for file in self.path.rglob("*"):
            stat = file.stat()
            state = (stat.st_mtime_ns, stat.st_size)
            if file.is_file() and self._synced.get(file) != state:
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                self._synced[file] = state

    def _clear(self) -> None:
        (self.path / _KEY).unlink(missing_ok=True)  # first: without it nothing else here counts
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


def check_target(target: Path) -> None:
    """Refuse a path that holds something else than a bundle, which replacing would destroy."""
    own = {GEOCLIP, staging_path(target / GEOCLIP).name}
    other = target.is_dir() and any(entry.name not in own for entry in target.iterdir())
    if other and not (target / MANIFEST).is_file():
        raise ExportError(f"{target} exists and is not an engine bundle; name another folder with --out")
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; name a folder with --out")


def keep_plans(target: Path, folder: Path) -> None:
    """Take over TensorRT's plans from an earlier bundle of the same encoders.

    Each is used only if it is of the same graph. Where the disk has no hard links they are built again.
    """
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    with suppress(BundleError, OSError):
        old, new = EngineBundle.open(target, verify=False), EngineBundle.open(folder, verify=False)
        if old.manifest.weights == new.manifest.weights and (target / FOLDER).is_dir():
            hidden = shutil.ignore_patterns(".*")
            shutil.copytree(target / FOLDER, folder / FOLDER, copy_function=os.link, ignore=hidden)


def keep_geoclip(target: Path, folder: Path) -> None:
    """Take over GeoCLIP from an earlier bundle in its place: it does not depend on the other encoders."""
    shutil.rmtree(folder / GEOCLIP, ignore_errors=True)
    if (target / GEOCLIP / MANIFEST).is_file():
        shutil.copytree(target / GEOCLIP, folder / GEOCLIP, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from building the bundle `target`; raises ExportError when one does already."""
    while (lock := _lock(target)) is None:
        pass  # the build that held it has just ended, and its folder is gone
    with lock:
        yield


def _lock(target: Path) -> IO[str] | None:
    """Return the lock of the staging folder, or None when its file went while it was taken."""
    file = staging_path(target) / _LOCK
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        try:
            lock = opened.enter_context(file.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.path.samestat(os.fstat(lock.fileno()), file.stat())
        except FileNotFoundError:
            return None
        except BlockingIOError:
            raise ExportError(
                f"another build of {target} is running; wait for it, or name another folder"
            ) from None
        if there:
            opened.pop_all()
            return lock
    return None
