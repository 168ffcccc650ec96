"""Sets of photos on disk whose places are known: the field's test sets by name, and anybody's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from geoengine.bench.truth import (
    EARTH,
    PartOf,
    PlanetPhotos,
    PlanetSeeds,
    Read,
    TruthError,
    TruthPhoto,
    TruthSet,
)
from geoengine.engine.errors import PhotoError
from geoengine.engine.photo_sets import PhotoEntry, PhotoSet, open_photo_set
from geoengine.engine.photo_sets.names import flickr_number, names_of
from geoengine.engine.photos import PHOTO_NAME, Photo, PhotoLimits, read_photo

PLANET_COUNT = 200
"""Photos of the planet when nobody says how many."""

_TABLES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class KnownSet:
    """A test set of the field: `photos` files, of which `places` have a published place."""

    name: str
    title: str
    photos: int
    places: int


KNOWN_SETS = {
    known.name: known
    for known in (
        KnownSet("im2gps", "IM2GPS", 237, 237),
        KnownSet("im2gps3k", "IM2GPS3k", 3000, 2997),
        KnownSet("yfcc4k", "YFCC4k", 4536, 4536),
    )
}
"""Hays and Efros 2008; Vo, Jacobs and Hays 2017 (both of the others)."""


def open_truth_set(
    spec: str,
    *,
    photos: Path | None = None,
    table: Path | None = None,
    count: int | None = None,
    seeds: Sequence[int] = (1,),
    limits: PhotoLimits | None = None,
) -> TruthSet:
    """Open what `geoengine evaluate` names: "planet", one of `KNOWN_SETS`, or a photo set with places.

    `photos` is the folder of the photos, `table` the file with their places. `count` is how many photos are
    drawn of the planet with each of `seeds`, and how many are chosen of another set with the one seed. Raises
    TruthError, and PhotoSetError for a table that cannot be used.
    """
    if spec == "planet":
        if photos is not None or table is not None:
            raise TruthError(
                "the planet's photos are drawn, --count of them: leave out --photos and --places"
            )
        count = PLANET_COUNT if count is None else count
        return PlanetPhotos(count, seeds[0]) if len(seeds) == 1 else PlanetSeeds(count, seeds)
    if len(seeds) > 1:
        raise TruthError(f"several seeds draw several sets of the planet's photos: {spec} takes one")
    limits = PhotoLimits() if limits is None else limits
    whole: TruthSet
    if spec in KNOWN_SETS:
        whole = NamedPhotos(KNOWN_SETS[spec], photos, table, limits)
    else:
        if not Path(spec).exists() and not set(spec) & set("{*?[./\\"):
            raise TruthError(
                f"{spec}: there is no such file or folder, and the sets known by name are planet, "
                f"{', '.join(KNOWN_SETS)}"
            )
        listed = Path(spec) if table is None else table
        inside = Path(spec) if table is not None and photos is None else photos
        whole = ListedPhotos(open_photo_set(listed, photos=inside, need_place=True), limits)
    return whole if count is None else PartOf(whole, count, seeds[0])


def refuse_trained(truth: TruthSet, training: Path) -> None:
    """Raise TruthError when photos of the set are among those that encoders were trained or tuned on.

    `training` is a folder made by `geoengine prepare`, or one of its lists; both its training and its
    validation photos are refused. Photos are the same when their ids are, or their Flickr numbers.
    """
    lists = [training] if training.is_file() else [training / "train.csv", training / "valid.csv"]
    if not lists[0].exists():
        raise TruthError(
            f"{training}: expected a folder made by `geoengine prepare`, with train.csv, or a list of photos"
        )
    tested = {name: photo.key for photo in truth for name in names_of(photo.key)}
    found: dict[str, tuple[str, Path]] = {}
    for table in lists:
        for entry in open_photo_set(table) if table.exists() else ():
            for name in names_of(entry.key) & tested.keys():
                found.setdefault(tested[name], (entry.key, table))
    if found:
        key, (trained, table) = next(iter(found.items()))
        raise TruthError(
            f"{len(found)} photos of {truth.title} are in {training}, the first {key}, in {table.name} as "
            f"{trained}: leave them out of the set, or train without them"
        )


def _name_in_set(key: str) -> str:
    """Return what a photo's file and its row in the table have in common, whatever was put before it."""
    return flickr_number(key) or min(names_of(key), default="")


class ListedPhotos:
    """The photos of a photo set in which every entry has a place; all are on Earth."""

    world, wanted = EARTH, None

    def __init__(self, listed: PhotoSet, limits: PhotoLimits) -> None:
        self._listed, self._limits = listed, limits
        self.title = listed.name
        self.name = Path(listed.name).stem or "photos"
        self.identity = listed.identity

    def __iter__(self) -> Iterator[TruthPhoto]:
        for entry in _distinct(self._listed):
            assert entry.place is not None  # asked for when the set was opened
            yield TruthPhoto(entry.key, entry.place, _reader(entry, self._limits))

    def remarks(self) -> list[str]:
        """Return nothing: no more is known than the photos and their places."""
        return []


class NamedPhotos:
    """A test set of the field: a folder of its photos, and the table of their places that others published.

    Photos and rows are matched by the Flickr names that both carry; a row without its photo is a photo that
    cannot be read, and counts as a miss. Photos without a row are left out, as everybody does.
    """

    world = EARTH

    def __init__(self, known: KnownSet, photos: Path | None, table: Path | None, limits: PhotoLimits) -> None:
        if photos is None:
            raise TruthError(
                f"{known.title} must be there already: name the folder of its {known.photos} photos with "
                "--photos, and the table of their places with --places if that is elsewhere"
            )
        if not photos.is_dir():
            raise TruthError(f"{photos}: there is no such folder of photos")
        self.name, self.title, self.wanted = known.name, known.title, known.places
        self._known, self._limits = known, limits
        self.table = _table_of(known.name, photos) if table is None else table
        self._listed = open_photo_set(self.table, photos=photos, need_place=True)
        self._files = {_name_in_set(file.name): file for file in _files_in(photos)}
        self.identity = self._listed.identity
        if not self._matched:
            raise TruthError(
                f"{photos}: none of the {len(self._files)} photos there is named as a row of {self.table}"
            )

    def __iter__(self) -> Iterator[TruthPhoto]:
        for entry in _distinct(self._listed):
            assert entry.place is not None  # asked for when the set was opened
            file = self._files.get(_name_in_set(entry.key))
            yield TruthPhoto(entry.key, entry.place, _file_reader(file, entry.key, self._limits))

    @cached_property
    def _matched(self) -> int:
        return sum(_name_in_set(entry.key) in self._files for entry in self._listed)

    def remarks(self) -> list[str]:
        """Say how many photos are there and how many there should be."""
        known, rows = self._known, sum(1 for _ in self._listed)
        remarks = []
        if rows != known.places:
            remarks.append(
                f"there are {rows} places in {self.table.name}, and {known.title} has {known.places}: "
                "figures of another number of photos do not compare with published ones"
            )
        if self._matched < rows:
            remarks.append(f"{rows - self._matched} of {rows} photos are not there and count as misses")
        if len(self._files) > self._matched:
            remarks.append(f"{len(self._files) - self._matched} photos without a known place are left out")
        return remarks


def _distinct(listed: PhotoSet) -> Iterator[PhotoEntry]:
    seen: set[str] = set()
    for entry in listed:
        if entry.key in seen:
            raise TruthError(
                f"{listed.name}, row {entry.row}: {entry.key} is there twice; remove one of the rows"
            )
        seen.add(entry.key)
        yield entry


def _reader(entry: PhotoEntry, limits: PhotoLimits) -> Read:
    return lambda: read_photo(entry.read(), limits=limits, name=entry.key)


def _file_reader(file: Path | None, key: str, limits: PhotoLimits) -> Read:
    def read() -> Photo:
        if file is None:
            raise PhotoError(f"{key}: there is no such photo in the folder")
        return read_photo(file, limits=limits, name=key)

    return read


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if PHOTO_NAME.fullmatch(file.name))


def _table_of(name: str, photos: Path) -> Path:
    """Return the table of a named set's places in the folder of its photos or beside it."""
    usual = f"{name}_places365.csv"
    for place in (photos / usual, photos.parent / usual):
        if place.is_file():
            return place
    tables: Sequence[Path] = [file for file in sorted(photos.iterdir()) if file.suffix.lower() in _TABLES]
    if len(tables) == 1:
        return tables[0]
    raise TruthError(
        f"{photos}: expected {usual} there or beside it, or one table of another name, with the columns "
        "IMG_ID, LAT and LON; name it with --places"
    )
