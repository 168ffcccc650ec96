"""The parts of a job: files of results in a folder, each written whole and under its number."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geoengine.engine.bulk.formats import ResultFiles, record_of
from geoengine.engine.bulk.stream import Failure, Outcome
from geoengine.engine.render.files import OutputError, writing

PHOTOS_PER_PART = 64
"""Photos in a part, unless told otherwise: what is located again after the process was killed."""

_PART = re.compile(r"part-(\d{8,})\.\w+")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts in a folder; any number of processes may write them.

    A part holds the results of consecutive photos and stands under their number, so that a part written
    twice is the same one. The failures of its photos lie in a file beside it, which is there before it.
    """

    folder: Path
    files: ResultFiles

    def file(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{number:08d}.{self.files.format}"

    def numbers(self) -> set[int]:
        """Return which parts there are."""
        names = (_PART.fullmatch(file.name) for file in self.folder.iterdir())
        return {int(name[1]) for name in names if name}

    def write(self, number: int, outcomes: Iterable[Outcome]) -> PartDone:
        """Write a part; raises OutputError."""
        records: list[dict[str, Any]] = []
        failures: list[Failure] = []
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                failures.append(outcome)
            else:
                records.append(record_of(outcome))
        write_failures(self._failed(number), failures)
        self.files.write(self.file(number), records)
        self._tries(number).unlink(missing_ok=True)
        return PartDone(number, len(records), len(failures))

    def tried(self, number: int) -> int:
        """Note that a part is being tried, and return how often it has been; `write` forgets it."""
        try:
            with self._tries(number).open("ab") as file:
                file.write(b".")
                return file.tell()
        except OSError as error:
            raise OutputError(f"{self._tries(number)}: cannot be written ({error.strerror})") from None

    def failures(self, numbers: Iterable[int]) -> Iterator[Failure]:
        """Yield the failures of parts, in their order."""
        for number in sorted(numbers):
            yield from read_failures(self._failed(number))

    def drop(self, numbers: Iterable[int]) -> None:
        """Delete parts."""
        for number in numbers:
            self.file(number).unlink(missing_ok=True)

    def drop_failures(self) -> None:
        """Delete the lists of failures that lie beside the parts."""
        for file in self.folder.glob("_failed-*.jsonl"):
            file.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed processes have left half written."""
        for file in (*self.folder.glob(".*.tmp"), *self.folder.glob("_tried-*")):
            with contextlib.suppress(OSError):
                file.unlink()

    def _tries(self, number: int) -> Path:
        return self.folder / f"_tried-{number:08d}"

    def _failed(self, number: int) -> Path:
        return self.folder / f"_failed-{number:08d}.jsonl"


@dataclass(frozen=True, slots=True)
class PartDone:
    """A part that has been written: how many of its photos were located, and how many could not be read."""

    number: int
    located: int
    failed: int


def write_failures(path: Path, failures: Iterable[Failure]) -> int:
    """Write failures as JSON lines and return their number; without any, there is no file afterwards.

    Raises OutputError.
    """
    rest = iter(failures)
    first = next(rest, None)
    if first is None:
        path.unlink(missing_ok=True)
        return 0
    count = 0
    with writing(path) as file:
        for failure in itertools.chain([first], rest):
            file.write((json.dumps(asdict(failure)) + "\n").encode())
            count += 1
    return count


def read_failures(path: Path) -> Iterator[Failure]:
    """Yield what `write_failures` wrote; nothing where there is no file. Raises OutputError."""
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield Failure(**json.loads(line))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path}: this list of failures cannot be read ({error})") from None
