"""Running a job on a cluster: each worker locates whole parts, and writes them itself."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from geoengine.engine.bulk.engines import EngineSpec, anywhere
from geoengine.engine.bulk.identity import bundle_identity
from geoengine.engine.bulk.items import Item, Items
from geoengine.engine.bulk.jobs import JOB, Job, JobError
from geoengine.engine.bulk.parts import PartDone, Parts
from geoengine.engine.bulk.stream import Failure, Outcome, PhotoSearch, locate_stream
from geoengine.engine.cluster import Cluster
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import GeoEngineError

PARTS_PER_WAVE = 16_384
"""Parts whose photos are listed and sent out together: some hundred bytes for each photo, in memory."""

TRIES = 3
"""Of a part whose worker dies; then its photos count as failed, lest one kills worker after worker."""

Part: TypeAlias = tuple[int, list[Item]]


@dataclass(kw_only=True, slots=True)
class LocateWork:
    """Locates parts of a job; `identity` is what the job's encoders and tiles are known by."""

    spec: EngineSpec
    search: PhotoSearch
    parts: Parts
    identity: Mapping[str, str]
    _engine: GeoEngine | None = field(default=None, init=False)

    def begin(self) -> None:
        """Open the engine; raises GeoEngineError when this machine sees another bundle, tiles or folder."""
        if not (self.parts.folder / JOB).exists():
            raise JobError(f"{self.parts.folder} is not there: results must go to storage that all share")
        engine = self.spec.open()
        there = {"encoders": bundle_identity(engine.bundle), "tiles": engine.source.identity}
        for name, what in (("encoders", "the engine bundle"), ("tiles", "the tile source")):
            if there[name] != self.identity[name]:
                raise JobError(f"{what} is not the same as where the job was begun")
        self._engine = engine

    def do(self, task: Part) -> PartDone:
        """Locate the photos of a part and write it, unless a worker that died has written it already."""
        number, items = task
        if self.parts.file(number).exists():
            failed = sum(1 for _ in self.parts.failures([number]))
            return PartDone(number, len(items) - failed, failed)
        if self.parts.tried(number) > TRIES:
            reason = f"the worker died {TRIES} times with this photo or another one of its part"
            return self.parts.write(
                number, (Failure(i.name, i.position, f"{i.name}: {reason}") for i in items)
            )
        assert self._engine is not None, "begin comes first"
        outcomes: list[Outcome] = []
        for searched in locate_stream(self._engine, ((number, item) for item in items), self.search):
            outcomes += searched.outcomes
        return self.parts.write(number, outcomes)


def spread_job(
    cluster: Cluster, spec: EngineSpec, job: Job, photos: Items, search: PhotoSearch
) -> Generator[PartDone, None, None]:
    """Locate the photos that a job has not located yet; yields each part when it is written.

    What listing the photos raises comes after the photos before it; what a worker raises ends the run, and
    the parts that are written stay.
    """
    config = search.config
    if config.prior is not None:  # perhaps a file
        config = replace(config, prior=anywhere(config.prior))
    work = LocateWork(
        spec=replace(spec, threads=cluster.workers.cpus),
        search=replace(search, config=config),
        parts=replace(job.parts, folder=job.parts.folder.absolute()),
        identity=job.order.identity,
    )
    error: GeoEngineError | None = None
    parts = parts_of(job.rest(photos))
    while error is None:
        wave: list[Part] = []
        try:
            wave += itertools.islice(parts, PARTS_PER_WAVE)
        except GeoEngineError as stop:
            error = stop
        if wave:
            yield from cluster.map(work, wave)
        elif error is None:
            break
    if error is not None:
        raise error
    job.finish()


def parts_of(numbered: Iterable[tuple[int, Item]]) -> Iterator[Part]:
    """Yield the parts that photos belong to, with paths that mean the same in another process."""
    for number, part in itertools.groupby(numbered, key=lambda pair: pair[0]):
        yield number, [_anywhere(item) for _, item in part]


def _anywhere(item: Item) -> Item:
    """Return a photo whose path means the same in another folder."""
    file = item.entry.file
    return item if file is None else replace(item, entry=replace(item.entry, file=file.absolute()))
