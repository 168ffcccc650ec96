"""Photos of the evaluation sets, which must be in no training split: known by name and by perceptual hash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from geoengine.engine.errors import PhotoError
from geoengine.engine.photo_sets import PhotoSet, PhotoSetError, open_photo_set
from geoengine.engine.photo_sets.names import names_of
from geoengine.training.mp16.pictures import read_picture

MOST_DIFFERING_BITS = 8
"""Of 64: copies of a photo in other sizes and qualities differ in fewer, other photos in about 32."""

_SIDE = 336


class HeldOut:
    """The names and hashes of photos that are kept out."""

    def __init__(self, names: set[str], hashes: Sequence[int]) -> None:
        self.names = names
        self._hashes = np.array(sorted(set(hashes)), np.uint64)

    def __len__(self) -> int:
        return len(self._hashes)

    def has_name(self, *texts: str) -> bool:
        """Tell whether an id, path or address is that of a photo that is kept out."""
        return any(name in self.names for text in texts if text for name in names_of(text))

    def looks_like(self, phash: int) -> bool:
        """Tell whether a photo looks like one that is kept out."""
        if not len(self._hashes):
            return False
        return int(np.bitwise_count(self._hashes ^ np.uint64(phash)).min()) <= MOST_DIFFERING_BITS


def read_held_out(
    specs: Sequence[str], hashes_of: Callable[[PhotoSet, Callable[[], list[int]]], list[int]]
) -> HeldOut:
    """Read the photos that are kept out.

    A spec is a folder of photos, anything else that `open_photo_set` takes, or a text file (.txt) of ids, one
    in a line. `hashes_of(photo_set, make)` returns the hashes of a set's photos, which `make` computes and
    somebody may remember. Raises PhotoSetError.
    """
    names: set[str] = set()
    hashes: list[int] = []
    for spec in specs:
        if Path(spec).suffix.lower() == ".txt":
            names |= _listed(Path(spec))
            continue
        photo_set = open_photo_set(spec)
        for entry in photo_set:
            for text in (entry.key, entry.url, entry.file.name if entry.file and not entry.size else ""):
                names |= names_of(text)
        hashes += hashes_of(photo_set, partial(_hashes, photo_set))
    return HeldOut(names, hashes)


def _listed(file: Path) -> set[str]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PhotoSetError(f"{file}: the list of photos cannot be read ({error})") from error
    return {name for line in lines if line.strip() for name in names_of(line.strip())}


def _hashes(photo_set: PhotoSet) -> list[int]:
    """Return the hashes of those photos of a set that are there and can be read."""
    hashes = []
    for entry in photo_set:
        try:
            hashes.append(read_picture(entry.read(), _SIDE).phash)
        except PhotoError:
            continue  # its name keeps it out
    return hashes
