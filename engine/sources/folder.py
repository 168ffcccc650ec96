"""Tiles from a folder of files z/x/y.png (or .jpg, .jpeg, .webp), rows counted from the north (XYZ)."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from geoengine.engine.cores import available_cores
from geoengine.engine.errors import SourceError
from geoengine.engine.sources import WORLD_BOUNDS, TileBatch, fingerprint
from geoengine.engine.sources.decode import read_picture
from geoengine.engine.sources.streaming import Encoded, Job, stream
from geoengine.engine.tiles import as_xy

_SUFFIXES = ("png", "jpg", "jpeg", "webp")
_TRIED = 8  # files looked at to find the tiles' side


class FolderSource:
    """The pictures in a folder; a file that is not there or does not decode is a missing tile.

    Raises SourceError for a folder in which no tile is found.
    """

    world = "earth"
    attribution = ""
    storable = True
    bounds = WORLD_BOUNDS

    def __init__(self, path: Path) -> None:
        self.name = path.resolve().name
        self._path = path
        tried = (read_picture(_read(file)) for file in islice(_some_tiles(path), _TRIED))
        sides = [picture.shape[1] for picture in tried if picture is not None]
        if not sides:
            raise SourceError(f"{path}: this folder has no tiles that can be read, in files like 4/8/5.png")
        self.tile_size = sides[0]
        zooms = [int(zoom.name) for zoom in _numbered(path) if zoom.is_dir()]
        self.min_zoom, self.max_zoom = zooms[0], zooms[-1]
        sample = (part for zoom in _numbered(path) for part in _described(zoom))
        self.identity = fingerprint("folder", *sample)

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles of the request that the folder has."""
        tiles = as_xy(z, xy).tolist()
        if (self._path / str(z)).is_dir():
            yield from stream(
                self._jobs(z, tiles), workers=available_cores(), tile_size=lambda _: self.tile_size
            )

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _jobs(self, z: int, tiles: list[list[int]]) -> Iterator[tuple[int, Job]]:
        for position, (x, y) in enumerate(tiles):
            yield position, partial(self._tile, self._path / f"{z}/{x}", y, _SUFFIXES)

    def _tile(self, column: Path, y: int, suffixes: tuple[str, ...]) -> Encoded | None:
        for number, suffix in enumerate(suffixes, start=1):
            data = _read(column / f"{y}.{suffix}")
            if data is not None:
                return Encoded(data, partial(self._tile, column, y, suffixes[number:]))
        return None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise SourceError(f"{path}: the tile cannot be read ({error.strerror})") from error


def _described(zoom: Path) -> Iterator[str]:
    """Yield the names and sizes of the first tiles of a zoom: a folder may hold millions."""
    for column in _numbered(zoom)[:_TRIED]:
        for file in _numbered(column)[:_TRIED]:
            yield f"{zoom.name}/{column.name}/{file.name} {file.stat().st_size}"


def _some_tiles(path: Path) -> Iterator[Path]:
    """Yield the tile files of a folder, coarse zooms first."""
    for zoom in _numbered(path):
        for column in _numbered(zoom):
            yield from (file for file in _numbered(column) if file.suffix[1:] in _SUFFIXES)


def _numbered(path: Path) -> list[Path]:
    try:
        return sorted((p for p in path.iterdir() if p.stem.isdecimal()), key=lambda p: int(p.stem))
    except OSError:
        return []
