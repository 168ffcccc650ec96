"""`geoengine locate --out`: any number of photos, with interruptions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from geoengine.commands.orders import EngineOrder, SearchOrder
from geoengine.commands.terminal import Exit, Rate, complain, progress_bar
from geoengine.engine.errors import GeoEngineError

if TYPE_CHECKING:
    from geoengine.engine.bulk.items import Items
    from geoengine.engine.bulk.jobs import Job, JobOrder, Target
    from geoengine.engine.bulk.parts import PartDone
    from geoengine.engine.engine import GeoEngine

_REPORT_S = 60.0  # between two lines about the progress, where there is no terminal for a bar


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkOrder:
    """Where results go, and what becomes of those that are there; checked before anything is opened."""

    target: Target
    part_photos: int
    restart: bool
    retry: bool

    @classmethod
    def parse(
        cls, out: Path | None, format_name: str | None, part_photos: int, restart: bool, retry: bool
    ) -> BulkOrder | None:
        """Check the options against each other, None without --out; raises GeoEngineError."""
        if out is None:
            if format_name is not None or restart or retry:
                raise GeoEngineError("--format, --restart and --retry-failed need --out")
            return None
        from geoengine.engine.bulk.jobs import Target

        if part_photos < 1:
            raise GeoEngineError(f"--photos-per-part must be at least 1, got {part_photos}")
        if restart and retry:
            raise GeoEngineError("--restart and --retry-failed exclude each other: choose one")
        target = Target.parse(out, format_name)
        target.format.require()
        return cls(target=target, part_photos=part_photos, restart=restart, retry=retry)


def locate_into(
    bulk: BulkOrder, photos: Sequence[Path], engine_order: EngineOrder, order: SearchOrder
) -> Exit:
    """Locate photos into a file or folder, all that are not in it; returns the exit status.

    Raises GeoEngineError when nothing could be begun.
    """
    from geoengine.engine.bulk.items import Items
    from geoengine.engine.bulk.jobs import open_job
    from geoengine.engine.photo_sets import open_photo_set

    items = Items([open_photo_set(spec) for spec in photos])
    with engine_order.open() as engine:
        job_order = _job_order(bulk, items, engine, engine_order, order)
        with open_job(bulk.target, job_order, restart=bulk.restart, retry=bulk.retry) as job:
            if job.state.complete:
                complain(f"{bulk.target.out}: all of it is done already")
                return _end(job)
            return _run(job, engine, items, order)


def _job_order(
    bulk: BulkOrder, items: Items, engine: GeoEngine, engine_order: EngineOrder, order: SearchOrder
) -> JobOrder:
    from geoengine.engine.bulk.identity import job_order

    return job_order(
        items,
        engine.bundle,
        engine.source,
        order.search(engine.bundle),
        backend=f"{engine_order.backend} {engine_order.precision or 'auto'}",
        index=engine_order.index,
        part_photos=bulk.part_photos,
    )


def _run(job: Job, engine: GeoEngine, items: Items, order: SearchOrder) -> Exit:
    from geoengine.engine.bulk.running import run_job

    begun = job.done
    done = 0
    with progress_bar("reading the photos") as show:
        report = _Report(
            show, begun * job.order.part_photos, job.state.failed if job.state.retry else items.count()
        )
        try:
            for part in run_job(engine, job, items, order.search(engine.bundle), report.search):
                done += part.located + part.failed
                report.part(part)
        except GeoEngineError as error:
            if not begun and not done:
                raise
            complain(str(error))
            complain(
                f"{job.target.out}: {done:,} photos done in this run; the same command goes on with the rest"
            )
            return Exit.SOME_FAILED
        except KeyboardInterrupt:
            complain(f"{job.target.out}: the same command goes on with what is done")
            raise
    return _end(job)


def _end(job: Job) -> Exit:
    """Say what a job that is complete has come to."""
    photos, failed = job.state.photos, job.state.failed
    where = f"; {failed:,} could not be read, see {job.target.failures}" if failed else ""
    complain(f"{job.target.out}: {photos - failed:,} photos located{where}")
    if not photos:
        complain("there is no photo in what was given")
    return Exit.FAILED if failed == photos else Exit.SOME_FAILED if failed else Exit.DONE


class _Report:
    """How far a job is: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self, show: Callable[[str, int, int | None], None], done: int, total: int | None) -> None:
        self._show = show
        self._total = total
        self._done = done if total is None else min(done, total)
        self._failed = 0
        self._rate = Rate("photos")
        self._rate.text(0, self._done, total)
        self._said = time.monotonic()

    def search(self, index: int, zoom: int, done: int, total: int) -> None:
        """Show how far the search is that is under way."""
        self._show(f"zoom {zoom}: {done:,} of {total:,} tiles{self._pace()}", self._done, self._total)

    def part(self, part: PartDone) -> None:
        """Show that a part is done."""
        self._done += part.located + part.failed
        self._failed += part.failed
        self._show(f"locating{self._pace()}", self._done, self._total)
        if not sys.stderr.isatty() and time.monotonic() - self._said >= _REPORT_S:
            self._said = time.monotonic()
            of = "" if self._total is None else f" of {self._total:,}"
            complain(f"{self._done:,}{of} photos{self._pace()}")

    def _pace(self) -> str:
        failed = f", {self._failed:,} failed" if self._failed else ""
        return self._rate.text(0, self._done, self._total) + failed
