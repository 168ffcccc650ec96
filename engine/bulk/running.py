"""Running a job in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from geoengine.engine.bulk.items import Items
from geoengine.engine.bulk.jobs import Job
from geoengine.engine.bulk.parts import PartDone
from geoengine.engine.bulk.stream import Outcome, PhotoSearch, locate_stream
from geoengine.engine.engine import GeoEngine
from geoengine.engine.search import Progress


def run_job(
    engine: GeoEngine, job: Job, photos: Items, search: PhotoSearch, progress: Progress | None = None
) -> Generator[PartDone, None, None]:
    """Locate the photos that a job has not located yet; yields each part when it is written.

    What listing, searching and writing raise passes through; the parts that are written stay.
    """
    outcomes: list[Outcome] = []
    with contextlib.closing(locate_stream(engine, job.rest(photos), search, progress)) as stream:
        for searched in stream:
            outcomes += searched.outcomes
            if searched.last:
                yield job.parts.write(searched.number, outcomes)
                outcomes = []
    job.finish()
