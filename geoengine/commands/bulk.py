"""`geoengine locate --out`: any number of photos, with interruptions."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from geoengine.commands.orders import ClusterOrder, EngineOrder, SearchOrder
from geoengine.commands.terminal import Exit, Rate, complain, progress_bar
from geoengine.engine.errors import GeoEngineError

if TYPE_CHECKING:
    from geoengine.engine.bulk.items import Items
    from geoengine.engine.bulk.jobs import Job, JobOrder, Target
    from geoengine.engine.bulk.parts import PartDone
    from geoengine.engine.bulk.stream import PhotoSearch
    from geoengine.engine.bundle import EngineBundle
    from geoengine.engine.sources import TileSource

_REPORT_S = 60.0  # between two lines about the progress, where there is no terminal for a bar


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkOrder:
    """Where results go, and what becomes of those that are there; checked before anything is opened."""

    target: Target
    part_photos: int
    restart: bool
    retry: bool
    cluster: ClusterOrder | None

    @classmethod
    def parse(
        cls,
        out: Path | None,
        format_name: str | None,
        part_photos: int,
        restart: bool,
        retry: bool,
        cluster: ClusterOrder | None,
    ) -> BulkOrder | None:
        """Check the options against each other, None without --out; raises GeoEngineError."""
        if out is None:
            if format_name is not None or restart or retry:
                raise GeoEngineError("--format, --restart and --retry-failed need --out")
            if cluster is not None:
                raise GeoEngineError("--ray needs --out: results are written by the workers")
            return None
        from geoengine.engine.bulk.jobs import Target

        if part_photos < 1:
            raise GeoEngineError(f"--photos-per-part must be at least 1, got {part_photos}")
        if restart and retry:
            raise GeoEngineError("--restart and --retry-failed exclude each other: choose one")
        target = Target.parse(out, format_name)
        target.format.require()
        return cls(target=target, part_photos=part_photos, restart=restart, retry=retry, cluster=cluster)


def locate_into(
    bulk: BulkOrder, photos: Sequence[Path], engine_order: EngineOrder, order: SearchOrder
) -> Exit:
    """Locate photos into a file or folder, all that are not in it; returns the exit status.

    Raises GeoEngineError when nothing could be begun.
    """
    from geoengine.engine.bulk.items import Items
    from geoengine.engine.photo_sets import open_photo_set

    items = Items([open_photo_set(spec) for spec in photos])
    if bulk.cluster is not None:
        return _locate_on_cluster(bulk, items, engine_order, order, bulk.cluster)
    with engine_order.open() as engine:
        search = order.search(engine.bundle)
        job_order = _job_order(bulk, items, engine.bundle, engine.source, search, engine_order)

        def work(job: Job, report: _Report) -> Iterator[PartDone]:
            from geoengine.engine.bulk.running import run_job

            return run_job(engine, job, items, search, report.search)

        return _run(bulk, job_order, items, work)


def _locate_on_cluster(
    bulk: BulkOrder, items: Items, engine_order: EngineOrder, order: SearchOrder, cluster_order: ClusterOrder
) -> Exit:
    from geoengine.engine.bulk.spread import spread_job
    from geoengine.engine.bundle import EngineBundle, resolve_bundle

    spec = engine_order.spec()
    bundle = EngineBundle.open(resolve_bundle(spec.bundle))
    search = order.search(bundle)
    with contextlib.closing(spec.source(bundle.world)) as source:
        job_order = _job_order(bulk, items, bundle, source, search, engine_order)
    with contextlib.ExitStack() as stack:

        def work(job: Job, report: _Report) -> Iterator[PartDone]:
            cluster = stack.enter_context(cluster_order.open())
            return spread_job(cluster, spec, job, items, search)

        return _run(bulk, job_order, items, work)


def _job_order(
    bulk: BulkOrder,
    items: Items,
    bundle: EngineBundle,
    source: TileSource,
    search: PhotoSearch,
    engine_order: EngineOrder,
) -> JobOrder:
    from geoengine.engine.bulk.identity import job_order

    return job_order(
        items,
        bundle,
        source,
        search,
        backend=f"{engine_order.backend} {engine_order.precision or 'auto'}",
        index=engine_order.index,
        part_photos=bulk.part_photos,
    )


def _run(
    bulk: BulkOrder,
    order: JobOrder,
    items: Items,
    work: Callable[[Job, _Report], Iterator[PartDone]],
) -> Exit:
    """Do a job's work, and say how it goes."""
    from geoengine.engine.bulk.jobs import open_job

    with open_job(bulk.target, order, restart=bulk.restart, retry=bulk.retry) as job:
        if job.state.complete:
            complain(f"{bulk.target.out}: all of it is done already")
            return _end(job)
        begun, done = job.done, 0
        total = job.state.failed if job.state.retry else items.count()
        with progress_bar("reading the photos") as show:
            report = _Report(show, begun * job.order.part_photos, total)
            try:
                for part in work(job, report):
                    done += part.located + part.failed
                    report.part(part)
            except GeoEngineError as error:
                if not begun and not done:
                    raise
                complain(str(error))
                out = f"{job.target.out}: {done:,} photos done in this run"
                complain(f"{out}; the same command goes on with the rest")
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
