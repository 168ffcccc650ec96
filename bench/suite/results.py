"""Files of results: one benchmark on one machine, written row by row, so that an interruption keeps them.

A file is JSON: `schema`, `benchmark`, `machine` (see `machine.describe`), `settings` (what the benchmark was
asked), `complete`, `facts` (what was measured once for all rows), and `rows`, each with a `key` of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from geoengine.bench.suite.machine import describe
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.render.files import OutputError, write_atomically

SCHEMA = 1


class ResultsError(GeoEngineError):
    """A file of results that cannot be read, or is of something else."""


class Results:
    """The file of one benchmark that is being run; every change is on disk at once.

    `known` tells which rows a run that was interrupted has left. Open it with `Results.start`.
    """

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = document

    @classmethod
    def start(
        cls, folder: Path, benchmark: str, settings: Mapping[str, Any], *, again: bool = False
    ) -> Results:
        """Begin a run, or go on with one of the same settings that was interrupted on this machine.

        The file is `<folder>/<machine>/<benchmark>.json`. A complete one is replaced, and with `again` one of
        another run too. Raises ResultsError for an unfinished run of other settings, another commit, or
        another schema, OutputError when the folder cannot be written.
        """
        machine = describe()
        path = folder / machine["name"] / f"{benchmark}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path.parent}: cannot be made ({error.strerror or error})") from None
        document = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "machine": machine,
            "settings": json.loads(json.dumps(settings)),
            "complete": False,
            "facts": {},
            "rows": [],
        }
        if path.exists() and not again:
            before = read(path)
            if not before["complete"]:
                _check_same(path, before, document)
                document = before
        results = cls(path, document)
        results._write()
        return results

    def known(self, key: str) -> bool:
        """Return whether a row is there already."""
        return any(row["key"] == key for row in self.document["rows"])

    def add(self, key: str, **figures: Any) -> None:  # noqa: ANN401 - whatever JSON takes
        """Add a row; raises OutputError."""
        self.document["rows"].append({"key": key, **figures})
        self._write()

    def state(self, **facts: Any) -> None:  # noqa: ANN401 - whatever JSON takes
        """Set facts that all rows share; raises OutputError."""
        self.document["facts"].update(facts)
        self._write()

    def finish(self) -> None:
        """Call the run complete; raises OutputError."""
        self.document["complete"] = True
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(self.document, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Return a file of results; raises ResultsError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read as results of a benchmark ({error})") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ResultsError(
            f"{path}: has results of schema {schema}, and this version reads {SCHEMA}: measure again with "
            "--again, or use the version that wrote them"
        )
    lacking = {"benchmark", "machine", "settings", "complete", "facts", "rows"} - set(document)
    if lacking:
        raise ResultsError(f"{path}: lacks {', '.join(sorted(lacking))}: measure again with --again")
    return dict(document)


def read_all(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the results of all machines in a folder, by machine and benchmark; raises ResultsError."""
    for path in sorted(folder.glob("*/*.json")):
        yield read(path)


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for what in ("settings", "commit", "packages"):
        old = before["settings"] if what == "settings" else before["machine"][what]
        new = now["settings"] if what == "settings" else now["machine"][what]
        if old != new:
            changed = [key for key in new if new[key] != old.get(key)] if isinstance(new, dict) else [new]
            raise ResultsError(
                f"{path}: an unfinished run had other {what} ({', '.join(map(str, changed))}): give the "
                "same again, or --again to throw its rows away"
            )
