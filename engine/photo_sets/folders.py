"""A photo's file, and a folder of them, as sets of photos."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from geoengine.engine.photo_sets import PhotoEntry, PhotoSetError
from geoengine.engine.photos import PHOTO_NAME


class FileSet:
    """A single photo, whatever its name is."""

    def __init__(self, file: Path) -> None:
        self.name = str(file)
        self._file = file

    @cached_property
    def identity(self) -> str:
        """Return the hash of the file's name."""
        return hashlib.sha256(os.fsencode(self._file.name)).hexdigest()

    def __iter__(self) -> Iterator[PhotoEntry]:
        yield PhotoEntry(key=self._file.name, row=1, file=self._file)

    def count(self) -> int:
        """Return 1."""
        return 1


class FolderSet:
    """The images in a folder and the folders in it, in the order of their names, folder by folder.

    Image files are known by their suffix; hidden files and folders are left out. Raises PhotoSetError when
    there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = folder
        if next(iter(self), None) is None:
            raise PhotoSetError(f"{folder}: there are no images in the folder or in the folders inside it")

    @cached_property
    def identity(self) -> str:
        """Return the hash of the files' paths in the folder: a photo that was damaged may be mended."""
        digest = hashlib.sha256()
        for entry in self:
            digest.update(os.fsencode(entry.key) + b"\0")
        return digest.hexdigest()

    def __iter__(self) -> Iterator[PhotoEntry]:
        for row, path in enumerate(_photos_in(self._folder, ()), start=1):
            yield PhotoEntry(key=path.relative_to(self._folder).as_posix(), row=row, file=path)

    def count(self) -> int:
        """Return the number of images."""
        return sum(1 for _ in _photos_in(self._folder, ()))


def _photos_in(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield the images under a folder; `above` are the folders it lies in, which a link may lead back to."""
    try:
        status = folder.stat()
        with os.scandir(folder) as listing:
            inside = sorted((each for each in listing if each.name[0] != "."), key=lambda each: each.name)
    except OSError as error:
        raise PhotoSetError(f"{folder}: the folder cannot be read ({error.strerror})") from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in inside:
        if entry.is_dir():
            yield from _photos_in(Path(entry.path), (*above, here))
        elif PHOTO_NAME.fullmatch(entry.name) and entry.is_file():
            yield Path(entry.path)
