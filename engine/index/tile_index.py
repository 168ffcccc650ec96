"""A tile index: a folder with a manifest and, for each level, the embeddings of its tiles.

```
manifest.json         whose embeddings of which tiles these are, and which levels are complete
z08.rows              a complete level, one segment
parts/z08-<hex>.rows  segments of a level that is being built, or of tiles met in searches
lock                  held by the process that builds
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import Backend
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.index.errors import IndexFileError, TileIndexError
from geoengine.engine.index.segments import HalfRows, Ids, Segment, find, tile_ids
from geoengine.engine.manifest import encoder_hash, model_name
from geoengine.engine.regions import Region
from geoengine.engine.sources import TileSource

SCHEMA = 1
MANIFEST = "manifest.json"
PARTS = "parts"

_PART = re.compile(r"z(\d\d)-[0-9a-f]{16}\.rows")


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """Whose embeddings of which tiles: `encoder` and `source` are hashes, the others are for people.

    `width` is the length of an embedding.
    """

    encoder: str
    source: str
    width: int
    model: str
    backend: str
    variant: str
    tiles: str
    attribution: str
    world: str

    @classmethod
    def of(cls, bundle: EngineBundle, source: TileSource, backend: Backend) -> Maker:
        """Return the maker of embeddings that a backend computes from a source's tiles."""
        return cls(
            encoder=encoder_hash(bundle.manifest),
            source=source.identity,
            width=bundle.embed_dim,
            model=model_name(bundle.manifest),
            backend=backend.name,
            variant=backend.variant,
            tiles=source.name,
            attribution=source.attribution,
            world=source.world,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """The tiles that an index was built for: those `within` a region, or of them only the `land`.

    `within` is "" for all that the source has.
    """

    land: bool = False
    within: str = ""

    def __str__(self) -> str:
        return ("land" if self.land else "all tiles") + (f" within {self.within}" if self.within else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What `manifest.json` says; `complete` are the zooms of which all tiles of the `areas` are there."""

    maker: Maker
    areas: tuple[Area, ...] = ()
    complete: tuple[int, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read a folder's manifest; raises TileIndexError when there is none or it cannot be used."""
        try:
            data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TileIndexError(
                f"{folder} is no tile index (it has no {MANIFEST}): `geoengine index build` makes one"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise TileIndexError(f"tile index {folder}: {MANIFEST} cannot be read: {error}") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise TileIndexError(
                f"tile index {folder}: this version reads schema {SCHEMA}, got {schema!r:.40}: build it again"
            )
        try:
            return cls(
                maker=Maker(**_typed(Maker, data["maker"])),
                areas=tuple(Area(**_typed(Area, area)) for area in data["areas"]),
                complete=tuple(int(zoom) for zoom in data["complete"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TileIndexError(f"tile index {folder}: {MANIFEST} cannot be used: {error}") from None

    def write(self, folder: Path) -> None:
        """Write the manifest; the old one stays when that fails. Raises OutputError."""
        from importlib.metadata import version

        from geoengine.engine.render.files import write_atomically

        data = {"schema": SCHEMA, "geoengine": version("geoengine"), **asdict(self)}
        write_atomically(folder / MANIFEST, json.dumps(data, indent=2) + "\n")

    def with_level(self, zoom: int) -> Description:
        """Return it with one more complete level."""
        return replace(self, complete=tuple(sorted({*self.complete, zoom})))


def _typed(kind: type, data: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, Any] = {"int": int, "str": str, "bool": bool}
    for name, annotation in kind.__annotations__.items():
        if type(data[name]) is not kinds[annotation]:
            raise ValueError(f'"{name}" must be of type {annotation}, got {data[name]!r:.40}')
    return {name: data[name] for name in kind.__annotations__}


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The embeddings of all tiles of one zoom that a search wants: `rows` of `matrix`, None for all.

    `ids` uint64[n] are the tiles of the matrix fp16[n, d]; `missing` tiles are wanted and have no picture.
    """

    ids: Ids
    matrix: HalfRows
    rows: NDArray[np.int64] | None
    missing: int


class TileIndex:
    """An open tile index; nothing but its manifest and the headers of its files is read on opening.

    Without `files`, the caller adds them.
    """

    def __init__(self, folder: Path, *, files: bool = True) -> None:
        self.path = folder
        self.description = Description.read(folder)
        self.segments: dict[int, list[Segment]] = {}
        for zoom, file in index_files(folder) if files else ():
            self.add(zoom, file)
        absent = [zoom for zoom in self.description.complete if zoom not in self.segments]
        if absent:
            raise IndexFileError(f"tile index {folder}: {level_file(folder, absent[0]).name} is missing")

    def add(self, zoom: int, file: Path) -> None:
        """Map one more file; raises IndexFileError when it is not of this index."""
        segment = Segment.open(file)
        if segment.zoom != zoom or segment.rows.shape[1] != self.description.maker.width:
            raise IndexFileError(f"{file}: this file belongs to another tile index")
        self.segments.setdefault(zoom, []).append(segment)

    def check_fits(self, bundle: EngineBundle, source: TileSource) -> None:
        """Raise TileIndexError when the index holds embeddings of other encoders or of other tiles."""
        maker = self.description.maker
        if maker.encoder != encoder_hash(bundle.manifest):
            raise TileIndexError(
                f"tile index {self.path} has embeddings of another encoder: it was built with {maker.model}, "
                f"whose weights are not those of engine bundle {bundle.path} "
                f"({model_name(bundle.manifest)}): name the bundle that it was built with, "
                "or build an index with this one"
            )
        if maker.source != source.identity:
            raise TileIndexError(
                f"tile index {self.path} has embeddings of other tiles: it was built from {maker.tiles}, and "
                f"these are the tiles of {source.name}, which are not the same: name the tiles that it was "
                "built from, or build an index of these"
            )

    def table(self, zoom: int, area: Region | None) -> Table | None:
        """Return all embeddings of a zoom's tiles in an area; None where the index may lack some of them.

        Without an area, these are all tiles that the source has.
        """
        if zoom not in self.description.complete:
            return None
        segment = self.segments[zoom][0]
        everywhere = any(not known.within for known in self.description.areas)
        if area is None:
            if not everywhere or not len(segment.ids):
                return None
            return Table(segment.ids, segment.rows, None, len(segment.missing))
        wanted = tile_ids(area.tiles(zoom))
        rows, lacks = find(segment.ids, wanted), find(segment.missing, wanted) >= 0
        unknown = (rows < 0) & ~lacks
        named = any(known.within == area.name for known in self.description.areas)
        if (unknown.any() and not (everywhere or named)) or not (rows >= 0).any():
            return None
        return Table(segment.ids, segment.rows, np.sort(rows[rows >= 0]), int(lacks.sum()))

    def look_up(self, zoom: int, ids: Ids, into: HalfRows) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Copy the embeddings of tiles into fp16[n, d]; return which were found and which are missing."""
        found, missing = np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=bool)
        for segment in self.segments.get(zoom, ()):
            rows = find(segment.ids, ids)
            new = (rows >= 0) & ~found
            into[new] = segment.rows[rows[new]]
            found |= new
            missing |= find(segment.missing, ids) >= 0
        return found, missing & ~found


def level_file(folder: Path, zoom: int) -> Path:
    """Return the file of a complete level."""
    return folder / f"z{zoom:02d}.rows"


def index_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the files of a tile index and their zooms, complete levels first."""
    for file in sorted(folder.glob("z[0-9][0-9].rows")):
        yield int(file.name[1:3]), file
    for file in sorted((folder / PARTS).glob("*.rows")):
        match = _PART.fullmatch(file.name)
        if match:
            yield int(match[1]), file
