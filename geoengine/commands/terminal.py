"""How every command speaks: results on stdout, everything else on stderr, errors as one plain sentence."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from geoengine.engine.errors import GeoEngineError

if TYPE_CHECKING:
    from rich.console import Console


class Exit(IntEnum):
    """Exit statuses of the commands."""

    DONE = 0
    SOME_FAILED = 1
    FAILED = 2
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class PlainGroup(TyperGroup):
    """Commands that fail with one sentence on stderr and an exit status, not with a traceback."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer's signature
        """Run the command."""
        try:
            return super().invoke(ctx)
        except GeoEngineError as error:
            complain(str(error))
            raise typer.Exit(Exit.FAILED) from None
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(Exit.INTERRUPTED) from None


def complain(message: str) -> None:
    """Write one line to stderr."""
    from geoengine.engine.render.table import printable

    print(f"geoengine: {printable(message)}", file=sys.stderr)


def write_result(text: str) -> None:
    """Write to stdout, at once; ends the command quietly when the reader is gone, as in `geoengine … | head`.

    Raises OutputError when stdout is a file that cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python flushes what is left once more at exit, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(Exit.BROKEN_PIPE) from None
        from geoengine.engine.render.files import OutputError

        raise OutputError(f"the results cannot be written ({error.strerror or error})") from None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on stderr, if it is a terminal, that `what` is going on."""
    if not sys.stderr.isatty():
        yield
        return
    with _stderr().status(what):
        yield


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a progress bar on stderr, if it is a terminal, until the block is left.

    Yields a function of (what is being done, steps done, steps in all or None when that is not known).
    """
    if not sys.stderr.isatty():
        yield lambda description, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_stderr(), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda description, done, total: progress.update(
            task, description=description, completed=done, total=total
        )


class Rate:
    """How fast a stage of some work is going, since this process began with it, and how long it will take.

    `things` is what is counted.
    """

    def __init__(self, things: str) -> None:
        self._things = things
        self._stage, self._start, self._done = -1, 0.0, 0

    def text(self, stage: int, done: int, total: int | None) -> str:
        """Return the rate and, with a total, the time left; nothing for the first second."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._start, self._done = stage, now, done
        if now - self._start < 1 or done == self._done:
            return ""
        rate = (done - self._done) / (now - self._start)
        left = "" if total is None else f", {duration((total - done) / rate)} left"
        return (
            f", {rate:,.0f} {self._things}/s{left}" if rate >= 10 else f", {rate:.2g} {self._things}/s{left}"
        )


def duration(seconds: float) -> str:
    """Return a time for people, in a unit that suits it."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1.5:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 1.5 else f"{seconds:.0f} s"


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)
