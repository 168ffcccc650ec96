"""From photos that are listed to places: reading the next photos while these are searched."""

from __future__ import annotations

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
class Searched:
    """What became of photos of one part, in their order; `last` when these are the part's last ones."""

    number: int
    outcomes: list[Outcome]
    last: bool


@dataclass(frozen=True, slots=True)
class _Listed:
    """A photo of a part, and whether it is the part's last one."""

    number: int
    item: Item
    last: bool


@dataclass(frozen=True, slots=True)
class _Ready:
    """A photo that has been read, as the square that the encoder sees, or why it has not."""

    listed: _Listed
    photo: Photo | Failure
    gps: LngLat | None = None


def locate_stream(
    engine: GeoEngine,
    numbered: Iterable[tuple[int, Item]],
    search: PhotoSearch,
    progress: Progress | None = None,
) -> Generator[Searched, None, None]:
    """Locate photos and yield what became of them, in their order and some at a time.

    Photos come with the number of the part that they belong to; those of one part follow each other, and are
    searched `PHOTOS_PER_SEARCH` at a time. At most as many wait for the next search, read and reduced to what
    the encoder sees, while one is under way. What a search raises passes through; what listing the photos
    raises comes after the photos before it.
    """
    with ReadAhead(lambda: _read_all(engine, numbered, search), depth=PHOTOS_PER_SEARCH) as ahead:
        while group := list(_taken(ahead)):
            last = group[-1].listed
            yield Searched(last.number, _located(engine, group, search, progress), last.last)


def _taken(ahead: ReadAhead[_Ready]) -> Iterator[_Ready]:
    """Yield the photos of the next search."""
    for _ in range(PHOTOS_PER_SEARCH):
        try:
            ready = ahead.take()
        except StopIteration:
            return
        yield ready
        if ready.listed.last:
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
    error: GeoEngineError | None = None
    with ThreadPoolExecutor(readers, thread_name_prefix="geoengine-photo") as pool:
        try:
            try:
                for listed in _with_ends(numbered):
                    waiting.append(pool.submit(_read, engine, listed, search))
                    if len(waiting) > 2 * readers:
                        yield waiting.popleft().result()
            except GeoEngineError as stop:
                error = stop
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
    if error is not None:
        raise error


def _with_ends(numbered: Iterable[tuple[int, Item]]) -> Iterator[_Listed]:
    before: tuple[int, Item] | None = None
    try:
        for number, item in numbered:
            if before is not None:
                yield _Listed(*before, last=before[0] != number)
            before = number, item
    except GeoEngineError:
        if before is not None:
            yield _Listed(*before, last=False)
        raise
    if before is not None:
        yield _Listed(*before, last=True)


def _read(engine: GeoEngine, listed: _Listed, search: PhotoSearch) -> _Ready:
    item = listed.item
    try:
        data = item.entry.read()
        # Many photos wait, and small: the engine leaves a square alone when it prepares it again.
        photo = engine.prepare(
            read_photo(data, limits=search.limits, name=item.name), method=search.config.method
        )
        gps = read_gps(data) if search.compare_exif else None
    except PhotoError as error:
        return _Ready(listed, Failure(item.name, item.position, str(error)))
    return _Ready(listed, photo, gps)
