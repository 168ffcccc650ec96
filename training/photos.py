"""Photos with known places to train on, wherever they come from, and the WebDataset shards of `prepare`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import PhotoError
from geoengine.engine.photo_sets import PhotoEntry, open_photo_set
from geoengine.engine.photos import read_photo
from geoengine.engine.preprocess import to_square
from geoengine.training.errors import TrainingError

SPLITS = ("train", "valid")

Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]


class Photos(Protocol):
    """The photos of one split.

    `keys` is uint64[m], below 2^63, distinct and the same in every run; `lng` and `lat` are float64[m], in
    degrees. `identity` tells this split from others.
    """

    @property
    def keys(self) -> npt.NDArray[np.uint64]:
        """The photos' names."""
        ...

    @property
    def lng(self) -> npt.NDArray[np.float64]:
        """Their longitudes."""
        ...

    @property
    def lat(self) -> npt.NDArray[np.float64]:
        """Their latitudes."""
        ...

    @property
    def identity(self) -> str:
        """A name of the split and of the pictures' geometry."""
        ...

    def called(self, row: int) -> str:
        """Return what people are told of a photo."""
        ...

    def read(self, rows: Int64Array) -> Iterator[tuple[Int64Array, UInt8Array]]:
        """Yield (positions in `rows`, int64[n]; pixels uint8[n, S, S, 3]), S the encoder's side, in order.

        A photo that cannot be read is left out.
        """
        ...


class Data(Protocol):
    """What to train on: a split for training and one for validation, of one world."""

    @property
    def name(self) -> str:
        """What people are told of it."""
        ...

    @property
    def world(self) -> str:
        """Where the photos were taken: "earth" or "planet"."""
        ...

    def split(self, name: str) -> Photos:
        """Return a split, "train" or "valid"."""
        ...


@dataclass(frozen=True, slots=True)
class Geometry:
    """The square that photos become before they are encoded, as the search does it."""

    size: int
    resize_mode: str


class Shards:
    """The folder that `geoengine prepare` writes: `train/*.tar` and `valid/*.tar`, WebDataset shards.

    Raises TrainingError for a folder without the two, PhotoSetError for damaged shards and for samples
    without coordinates.
    """

    world = "earth"

    def __init__(self, folder: Path, geometry: Geometry, *, workers: int = 4) -> None:
        self.name = str(folder)
        missing = [split for split in SPLITS if not any((folder / split).glob("*.tar"))]
        if missing:
            raise TrainingError(
                f"{folder} has no shards {' and '.join(f'{split}/*.tar' for split in missing)}: "
                "name a folder that geoengine prepare wrote, or the word planet"
            )
        self._folder, self._geometry, self._workers = folder, geometry, workers

    def split(self, name: str) -> Photos:
        """Return a split, "train" or "valid"."""
        return ShardPhotos(self._folder / name, self._geometry, self._workers)


class ShardPhotos:
    """The photos of a folder of tars; where each one lies is kept, 40 bytes a photo, and no picture."""

    def __init__(self, folder: Path, geometry: Geometry, workers: int) -> None:
        photo_set = open_photo_set(folder, need_place=True)
        self.identity = f"{geometry.size}-{geometry.resize_mode}-{photo_set.identity}"
        self._geometry, self._workers = geometry, workers
        self._files: list[Path] = []
        keys, places, spots = [], [], []
        for entry in photo_set:
            assert entry.place is not None and entry.file is not None  # so asked for; tars have files
            if not self._files or self._files[-1] != entry.file:
                self._files.append(entry.file)
            keys.append(_key(entry.key))
            places.append(entry.place)
            spots.append((len(self._files) - 1, entry.offset, entry.size or 0, entry.row))
        self.keys = np.array(keys, np.uint64)
        self.lng, self.lat = np.array(places, np.float64).reshape(-1, 2).T.copy()
        self._spots = np.array(spots, np.int64).reshape(-1, 4)
        if len(np.unique(self.keys)) < len(self.keys):
            raise TrainingError(f"{folder} holds two samples of one key; prepare the shards again")

    def called(self, row: int) -> str:
        """Return the tar and the number of the sample in it."""
        file, _, _, number = self._spots[row].tolist()
        return f"{self._files[file]}, sample {number}"

    def read(self, rows: Int64Array) -> Iterator[tuple[Int64Array, UInt8Array]]:
        """Yield (positions, pixels) of the rows, in order; decoding runs on threads."""
        with ThreadPoolExecutor(self._workers) as pool:
            for start in range(0, len(rows), _CHUNK):
                part = rows[start : start + _CHUNK]
                pictures = list(pool.map(self._picture, part.tolist()))
                there = [i for i, picture in enumerate(pictures) if picture is not None]
                if there:
                    pixels = np.stack([picture for picture in pictures if picture is not None])
                    yield np.array(there, np.int64) + start, pixels

    def _picture(self, row: int) -> UInt8Array | None:
        file, offset, size, number = self._spots[row].tolist()
        entry = PhotoEntry(key=str(number), row=number, file=self._files[file], offset=offset, size=size)
        try:
            photo = read_photo(entry.read(), name=self.called(row))
        except PhotoError:
            return None
        return to_square(photo.pixels, self._geometry.size, self._geometry.resize_mode)


_CHUNK = 64


def _key(text: str) -> int:
    """Return 63 bits of a hash of a sample's key."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


OpenData = Callable[[Geometry], Data]
"""Opens the data once the encoder's side is known."""
