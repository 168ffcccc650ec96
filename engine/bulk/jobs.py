"""Jobs: locating many photos into a file or a folder, a part at a time, with interruptions.

A job lies in a folder: the one that the results go to, or, for results in one file, `FILE.job` beside it.

```
_job.json             what is located, with what and how, and how far the job is
part-00000000.jsonl   the results of the first photos; of a folder, these files are the results
_failed-00000000.jsonl  which of these photos could not be read, and why
_tried-00000000       how often workers have begun a part, while one is at it
_retried.jsonl        the failures that are being tried again
_lock                 held by the process that runs the job
```
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from geoengine.engine.bulk.formats import ResultFiles, ResultFormat
from geoengine.engine.bulk.items import Item, Items
from geoengine.engine.bulk.parts import Parts, read_failures, write_failures
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.render.files import check_writable, locked, write_atomically

SCHEMA = 1
JOB = "_job.json"


_OTHER = {
    "photos": "its photos are others",
    "encoders": "it has another engine bundle",
    "backend": "it runs on another backend or in another precision",
    "tiles": "it has other map tiles",
    "index": "it has another tile index",
    "search": "its search options are others",
    "format": "it writes another format",
    "parts": "its parts have another size",
}


class JobError(GeoEngineError):
    """A job cannot be begun or gone on with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where results go: `out` is a file, or with `in_parts` a folder that keeps the parts."""

    out: Path
    format: ResultFormat
    in_parts: bool

    @classmethod
    def parse(cls, out: Path, format_name: str | None) -> Target:
        """Understand a path and a format, which only a folder needs; raises GeoEngineError."""
        named = ResultFormat.of(out)
        if named is not None:
            if format_name not in (None, named):
                raise JobError(
                    f"{out}: its name says {named}, and --format {format_name}: leave out --format"
                )
            return cls(out=out, format=named, in_parts=False)
        chosen = format_name or ResultFormat.JSONL
        if chosen not in list(ResultFormat):
            raise JobError(f"unknown format {chosen!r}: there are {', '.join(ResultFormat)}")
        return cls(out=out, format=ResultFormat(chosen), in_parts=True)

    @property
    def folder(self) -> Path:
        """The folder of the job."""
        return self.out if self.in_parts else self.out.with_name(f"{self.out.name}.job")

    @property
    def failures(self) -> Path:
        """The list of photos that could not be read, once the job is done."""
        return self.out / "_failures.jsonl" if self.in_parts else self.out.with_suffix(".failures.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOrder:
    """What a job is: `identity` has a hash for each thing that a run of the same job shares, by its name.

    `world` and `about` are those of `ResultFiles`; `part_photos` is how many photos a part has.
    """

    identity: Mapping[str, str]
    world: str
    about: Mapping[str, str]
    part_photos: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """How far a job is: its round of work begins with part `first`.

    The first round has all photos, each `retry` those that failed in the round before. Of a `complete` job,
    `photos` is how many there are and `failed` how many could not be read.
    """

    first: int = 0
    retry: bool = False
    complete: bool = False
    photos: int = 0
    failed: int = 0


@contextlib.contextmanager
def open_job(target: Target, order: JobOrder, *, restart: bool = False, retry: bool = False) -> Iterator[Job]:
    """Begin a job, or go on with it, and hold its lock for the block.

    With `restart`, what is there is deleted first; with `retry`, a job that is done goes on with the photos
    that could not be read. Raises JobError for a folder of another job, of none, or that another process
    holds; OutputError when the system refuses.
    """
    target.format.require()
    folder = target.folder
    if not target.in_parts:
        check_writable(target.out)
    if not restart and not (folder / JOB).exists():
        if not target.in_parts and target.out.exists():
            raise JobError(f"{target.out}: exists, and is of no job: give --out another name, or --restart")
        if _holds_something(folder):
            raise JobError(f"{folder}: the folder is not empty, and holds no job: give --out another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{folder}: the folder cannot be made ({error.strerror or error})") from None
    with locked(folder / "_lock", f"{folder}: another process runs this job; wait for it"):
        if restart:
            _clear(target)
        state = _read_state(target, order)
        job = Job(target, order, state or JobState())
        if state is None:
            job.begin()
        job.resume()
        if retry and job.state.complete and job.state.failed:
            job.retry()
        yield job


class Job:
    """A job of one process, which holds its lock; `open_job` makes one."""

    def __init__(self, target: Target, order: JobOrder, state: JobState) -> None:
        self.target = target
        self.order = order
        self.state = state
        self.parts = Parts(
            target.folder, ResultFiles(format=target.format, world=order.world, about=dict(order.about))
        )
        self.listed = 0
        """Photos of the round, once `rest` has ended."""

    @property
    def done(self) -> int:
        """How many parts of this round are there."""
        return sum(number >= self.state.first for number in self.parts.numbers())

    def rest(self, photos: Items) -> Iterator[tuple[int, Item]]:
        """Yield the photos of the round that no part has yet, with the numbers of their parts."""
        there = self.parts.numbers()
        self.listed = 0
        for item in self._wanted(photos):
            number = self.state.first + self.listed // self.order.part_photos
            self.listed += 1
            if number not in there:
                yield number, item

    def finish(self) -> None:
        """Put the results in place, when all parts are there; what is done stays when that fails."""
        numbers = self.parts.numbers()
        wanted = range(self.state.first, self.state.first - (-self.listed // self.order.part_photos))
        lacking = sorted(set(wanted) - numbers)
        if lacking:
            raise JobError(
                f"{self.target.folder}: {self.parts.file(lacking[0]).name} is missing; run it again"
            )
        if not self.target.in_parts:
            self.parts.files.join(self.target.out, map(self.parts.file, sorted(numbers)))
        failed = write_failures(self.target.failures, self.parts.failures(wanted))
        photos = self.state.photos if self.state.retry else self.listed
        self._save(replace(self.state, complete=True, photos=photos, failed=failed))
        self._tidy()

    def retry(self) -> None:
        """Begin a round with the photos that could not be read."""
        numbers = self.parts.numbers() if self.target.in_parts else {0}
        self._save(replace(self.state, retry=True, complete=False, first=max(numbers, default=-1) + 1))
        self._take_back()

    def resume(self) -> None:
        """Put right what a killed process may have left."""
        self.parts.sweep()
        if self.state.complete:
            self._tidy()
            if not self.target.in_parts and not self.target.out.exists():
                raise JobError(f"{self.target.out}: the job is done and its results are gone: give --restart")
        elif self.state.retry:
            self._take_back()

    def _wanted(self, photos: Items) -> Iterator[Item]:
        if not self.state.retry:
            yield from photos
            return
        failed = {failure.position for failure in read_failures(self._retried)}
        yield from (item for item in photos if item.position in failed)

    def _take_back(self) -> None:
        """Make the results so far a part again, and keep the list of what is tried again."""
        if self.target.failures.exists() and not self._retried.exists():
            self.target.failures.replace(self._retried)
        first = self.parts.file(0)
        if not self.target.in_parts and self.target.out.exists() and not first.exists():
            self.target.out.replace(first)

    def _tidy(self) -> None:
        """Delete what a complete job does not need."""
        if not self.target.in_parts:
            self.parts.drop(self.parts.numbers())
        self.parts.drop_failures()
        self._retried.unlink(missing_ok=True)

    @property
    def _retried(self) -> Path:
        return self.target.folder / "_retried.jsonl"

    def _save(self, state: JobState) -> None:
        data = {"schema": SCHEMA, "format": self.target.format, **asdict(self.order), "state": asdict(state)}
        write_atomically(self.target.folder / JOB, json.dumps(data, indent=2) + "\n")
        self.state = state

    def begin(self) -> None:
        """Write the job's description into its folder."""
        self._save(self.state)


def _holds_something(folder: Path) -> bool:
    """Whether a folder has files that a job killed in its first moment cannot have left."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(name != "_lock" and not name.endswith(".tmp") for name in names)


def _clear(target: Target) -> None:
    """Delete the job and its results."""
    (target.folder / JOB).unlink(missing_ok=True)  # first: without it, the rest is of no job
    if not target.in_parts:
        target.out.unlink(missing_ok=True)
    target.failures.unlink(missing_ok=True)
    for pattern in ("part-*", "_failed-*.jsonl", "_tried-*", "_retried.jsonl", ".*.tmp"):
        for file in target.folder.glob(pattern):
            file.unlink(missing_ok=True)


def _read_state(target: Target, order: JobOrder) -> JobState | None:
    """Return how far the job in a folder is, None when there is none; raises JobError for another one's.

    One of which nothing is done, because it was begun in error, does not count.
    """
    path = target.folder / JOB
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise JobError(f"{path}: this version reads schema {SCHEMA}: give --restart")
        there = {"format": data["format"], "parts": str(data["part_photos"]), **data["identity"]}
        state = JobState(**data["state"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(f"{path}: it cannot be read ({error}): give --restart to begin anew") from None
    wanted = {"format": target.format.value, "parts": str(order.part_photos), **order.identity}
    others = [name for name in wanted if there.get(name) != wanted[name]]
    if others and not state.complete and not any(target.folder.glob("part-*")):
        return None  # nothing was done
    if others:
        raise JobError(
            f"{target.out} belongs to another job: {', '.join(_OTHER[name] for name in others)}: "
            "give --out another name, or --restart to delete its results"
        )
    return state
