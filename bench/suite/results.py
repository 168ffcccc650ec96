"""Files of results: one benchmark on one machine, written row by row, so that an interruption keeps them.

A file is JSON: `schema`, `benchmark`, `machine` (see `machine.describe`), `settings` (what the benchmark was
asked), `complete`, `facts` (what was measured once for all rows), and `rows`, each with a `key` of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from geoengine.bench.suite.machine import describe
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.render.files import OutputError, check_writable, locked, write_atomically

SCHEMA = 1

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""Takes what is being done, steps done, and steps in all or None when that is not known."""

_PARTS = {"benchmark": str, "machine": dict, "settings": dict, "complete": bool, "facts": dict, "rows": list}
_SAME = ("cpu", "cores", "gpu", "driver", "python", "packages", "commit")
"""What of a machine must not change within a run."""


class ResultsError(GeoEngineError):
    """A file of results that cannot be read, or is of something else."""


class Results:
    """The file of one benchmark that is being run; every change is on disk at once.

    `known` tells which rows a run that was interrupted has left. Open it with `Results.start`, in a `with`.
    """

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = document

    @classmethod
    @contextmanager
    def start(
        cls, folder: Path, benchmark: str, settings: Mapping[str, Any], *, again: bool = False
    ) -> Iterator[Results]:
        """Begin a run, or go on with one of the same settings that was interrupted on this machine.

        The file is `<folder>/<machine>/<benchmark>.json`; until the block is left, no other process can run
        the benchmark there. A complete one is replaced by the first row, not before; with `again`, an
        unfinished one too. Raises ResultsError for an unfinished run of other settings, on another machine
        or commit, or of another schema, and while another process runs it; OutputError when the folder cannot
        be written.
        """
        machine = describe()
        path = folder / machine["name"] / f"{benchmark}.json"
        make_folder(path.parent)
        check_writable(path)
        document = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "machine": machine,
            "settings": json.loads(json.dumps(settings)),
            "complete": False,
            "facts": {},
            "rows": [],
        }
        with _only_run(path):
            if path.exists() and not again:
                before = read(path)
                if not before["complete"]:
                    _check_same(path, before, document)
                    document = before
            yield cls(path, document)

    def known(self, key: str) -> bool:
        """Return whether a row is there already."""
        return any(row["key"] == key for row in self.document["rows"])

    def add(self, key: str, **figures: Any) -> None:  # noqa: ANN401 - whatever JSON takes
        """Add a row; raises OutputError."""
        self.document["rows"].append({"key": key, **figures})
        self._write()

    def state(self, **facts: Any) -> None:  # noqa: ANN401 - whatever JSON takes
        """Set facts that all rows share, written with the first row or after it; raises OutputError."""
        self.document["facts"].update(facts)
        if self.document["rows"]:
            self._write()

    def finish(self) -> None:
        """Call the run complete; raises OutputError."""
        self.document["complete"] = True
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(self.document, indent=1) + "\n")


def machine_folder(folder: Path) -> Path:
    """Return the folder for this machine's results in a folder, made where there is none.

    Raises OutputError.
    """
    own = folder / str(describe()["name"])
    make_folder(own)
    return own


def make_folder(folder: Path) -> None:
    """Make a folder where there is none; raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror or error})") from None


def write_plots(folder: Path, plots: Mapping[str, str]) -> list[Path]:
    """Write each plot, an SVG text, as `<folder>/<its name>.svg`; returns the files, raises OutputError."""
    files = []
    for name, text in plots.items():
        file = folder / f"{name}.svg"
        write_atomically(file, text)
        files.append(file)
    return files


def read(path: Path) -> dict[str, Any]:
    """Return a file of results; raises ResultsError."""
    document = read_json(path)
    schema = document.get("schema")
    if schema != SCHEMA:
        raise ResultsError(
            f"{path}: has results of schema {schema}, and this version reads {SCHEMA}: measure again with "
            "--again, or use the version that wrote them"
        )
    for what, kind in _PARTS.items():
        if not isinstance(document.get(what), kind):
            raise ResultsError(f"{path}: lacks {what}, or has it in another form: measure again with --again")
    if not all(isinstance(row, dict) and "key" in row for row in document["rows"]):
        raise ResultsError(f"{path}: has rows without a key: measure again with --again")
    if not isinstance(document["machine"].get("name"), str):
        raise ResultsError(f"{path}: does not name its machine: measure again with --again")
    return document


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises ResultsError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(
            f"{path}: cannot be read as results of a benchmark ({error}): measure again with --again"
        ) from None
    if not isinstance(document, dict):
        raise ResultsError(f"{path}: holds no results of a benchmark, but other JSON: take it away")
    return document


@contextmanager
def _only_run(path: Path) -> Iterator[None]:
    """Keep other processes from running a benchmark while the block runs; raises ResultsError."""
    lock = path.with_name(f".{path.stem}.lock")
    holder = ""
    with suppress(OSError):
        holder = lock.read_text(encoding="utf-8", errors="replace")
    busy = f"{path}: another run{holder and f' ({holder})'} writes there; wait for it, or give another --out"
    with locked(lock, busy, ResultsError):
        with suppress(OSError):  # only the other run's message lacks it
            now = datetime.now(UTC)
            lock.write_text(f"process {os.getpid()}, since {now:%Y-%m-%d %H:%M:%S} UTC", encoding="utf-8")
        yield


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ResultsError unless rows of both runs may stand in one table."""
    pairs = {"settings": (before["settings"], now["settings"])}
    pairs |= {what: (before["machine"].get(what), now["machine"][what]) for what in _SAME}
    for what, (old, new) in pairs.items():
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            detail = ", ".join(f"{key}: {old.get(key)}, now {new.get(key)}" for key in changed)
        else:
            detail = f"{old}, now {new}"
        raise ResultsError(
            f"{path}: an unfinished run had other {what} ({detail}): give the same again, or --again to "
            "throw its rows away"
        )
