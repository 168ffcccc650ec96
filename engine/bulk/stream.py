"""From photos that are listed to places: reading the next photos while these are searched."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

from geoengine.engine.bulk.items import Item
from geoengine.engine.cores import available_cores
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import GeoEngineError, PhotoError
from geoengine.engine.photos import Photo, PhotoLimits, read_gps, read_photo
from geoengine.engine.readahead import ReadAhead
from geoengine.engine.results import ExifComparison, Location
from geoengine.engine.search import Progress, SearchConfig
from geoengine.engine.tiles import LngLat, great_circle_km

PHOTOS_PER_SEARCH = 64
"""Photos searched together: enough to share tiles, few enough that a folder's first results come early."""

_MOST_READERS = 8  # each may hold one whole photo in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoSearch:
    """How photos are read and searched; `compare_exif` notes how far each answer is from the GPS tag."""

    config: SearchConfig
    limits: PhotoLimits
    compare_exif: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A photo that could not be read, and why: `reason` is a sentence that names it.

    `position` is its place in the run, from 0.
    """

    photo: str
    position: int
    reason: str


Outcome: TypeAlias = Location | Failure


@dataclass(frozen=True, slots=True)
class _Ready:
    """A photo that has been read, as the square that the encoder sees, or why it has not."""

    number: int
    photo: Photo | Failure
    gps: LngLat | None


def locate_stream(
    engine: GeoEngine,
    numbered: Iterable[tuple[int, Item]],
    search: PhotoSearch,
    progress: Progress | None = None,
) -> Generator[tuple[int, list[Outcome]], None, None]:
    """Locate photos and yield what became of them, in their order, some at a time and with their number.

    Photos come with the number of the part that they belong to; those of one part follow each other, and are
    searched `PHOTOS_PER_SEARCH` at a time. At most as many wait for the next search, read and reduced to what
    the encoder sees, while one is under way. What a search raises passes through; what listing the photos
    raises comes after the photos before it.
    """
    with ReadAhead(lambda: _read_all(engine, numbered, search), depth=PHOTOS_PER_SEARCH) as ahead:
        for number, part in itertools.groupby(_taken(ahead), key=lambda ready: ready.number):
            while group := list(itertools.islice(part, PHOTOS_PER_SEARCH)):
                yield number, _located(engine, group, search, progress)


def _taken(ahead: ReadAhead[_Ready]) -> Iterator[_Ready]:
    while True:
        try:
            yield ahead.take()
        except StopIteration:
            return


def _located(
    engine: GeoEngine, group: list[_Ready], search: PhotoSearch, progress: Progress | None
) -> list[Outcome]:
    photos = [ready.photo for ready in group if isinstance(ready.photo, Photo)]
    places = iter(engine.locate(photos, config=search.config, progress=progress) if photos else ())
    return [
        ready.photo if isinstance(ready.photo, Failure) else _compared(next(places), ready, search)
        for ready in group
    ]


def _compared(location: Location, ready: _Ready, search: PhotoSearch) -> Location:
    if not search.compare_exif:
        return location
    distance_km = None if ready.gps is None else great_circle_km(location.point, ready.gps)
    return replace(location, exif=ExifComparison(distance_km=distance_km))


def _read_all(
    engine: GeoEngine, numbered: Iterable[tuple[int, Item]], search: PhotoSearch
) -> Iterator[_Ready]:
    """Read photos on several threads, and yield them in their order."""
    readers = min(available_cores(), _MOST_READERS)
    waiting: deque[Future[_Ready]] = deque()
    with ThreadPoolExecutor(readers, thread_name_prefix="geoengine-photo") as pool:
        try:
            end: GeoEngineError | None = None
            try:
                for number, item in numbered:
                    waiting.append(pool.submit(_read, engine, number, item, search))
                    if len(waiting) > 2 * readers:
                        yield waiting.popleft().result()
            except GeoEngineError as error:
                end = error
            while waiting:
                yield waiting.popleft().result()
            if end is not None:
                raise end
        finally:
            for future in waiting:
                future.cancel()


def _read(engine: GeoEngine, number: int, item: Item, search: PhotoSearch) -> _Ready:
    try:
        data = item.entry.read()
        # Many photos wait, and small: the engine leaves a square alone when it prepares it again.
        photo = engine.prepare(read_photo(data, limits=search.limits, name=item.name))
        gps = read_gps(data) if search.compare_exif else None
    except PhotoError as error:
        return _Ready(number, Failure(item.name, item.position, str(error)), None)
    return _Ready(number, photo, gps)
