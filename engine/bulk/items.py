"""The photos of a run: those of one or several photo sets, in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from geoengine.engine.photo_sets import PhotoEntry, PhotoSet
from geoengine.engine.photo_sets.folders import FileSet, FolderSet
from geoengine.engine.sources import fingerprint


@dataclass(frozen=True, slots=True)
class Item:
    """A photo that waits to be located: `name` is what results and messages call it.

    `position` is its place in the run, from 0.
    """

    name: str
    position: int
    entry: PhotoEntry


class Items:
    """The photos of several sets, one set after the other; listed in the same order each time.

    Photos named by files and folders are called by their paths, others by their keys; where there are several
    sets, a key stands behind the name of its set.
    """

    def __init__(self, sets: Sequence[PhotoSet]) -> None:
        self._sets = tuple(sets)

    @property
    def identity(self) -> str:
        """What tells the photos from others: SHA-256 in hex."""
        return fingerprint(*(photos.identity for photos in self._sets))

    def count(self) -> int | None:
        """Return the number of photos, or None where finding out takes as long as reading the sets."""
        counts = [photos.count() for photos in self._sets]
        return None if None in counts else sum(count for count in counts if count is not None)

    def __iter__(self) -> Iterator[Item]:
        position = 0
        for photos in self._sets:
            by_path = isinstance(photos, FileSet | FolderSet)
            before = "" if by_path or len(self._sets) == 1 else f"{photos.name}/"
            for entry in photos:
                name = str(entry.file) if by_path else f"{before}{entry.key}"
                # Names of files may be any bytes, and those of results are UTF-8.
                name = name.encode("utf-8", "backslashreplace").decode()
                yield Item(name, position, entry)
                position += 1
