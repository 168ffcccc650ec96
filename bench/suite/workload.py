"""What the suite runs: real-size encoders, map tiles on the disk, and photos, all made on the spot.

Speed does not depend on what encoders have learnt, so random weights do, and nothing is downloaded. Tiles
are JPEG pictures in an MBTiles file, as a user would have them; a bundle, tiles and photos of one's own take
their places.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geoengine.bench.suite.machine import gpu_name
from geoengine.engine.bundle import PLANET
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.manifest import MANIFEST
from geoengine.engine.render.files import OutputError
from geoengine.engine.sources import TileBatch, fingerprint, planet
from geoengine.engine.sources.mbtiles import MBTilesSource
from geoengine.engine.tiles import LngLat, all_xy

if TYPE_CHECKING:
    from geoengine.export.check import Progress

MODEL = "ViT-B-32-quickgelu"
POOL_ZOOM = 4  # of the file whose 256 pictures all tiles are made of
TILE_SIDE = 256
_QUALITY = 85  # of JPEG


def suite_folder() -> Path:
    """Return where the suite keeps what it made: `bench` in GEOENGINE_CACHE or the user's cache folder."""
    chosen = os.environ.get("GEOENGINE_CACHE", "").strip()
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache"
    kept = Path(chosen).expanduser() if chosen and chosen.lower() != "off" else Path(base) / "geoengine"
    return kept / "bench"


def resolve_bundle(spec: str | None, progress: Progress | None = None) -> Path:
    """Return the folder of a bundle: of the one named, or of random ViT-B/32 encoders, built the first time.

    `spec` is a folder, "planet", or None. Raises GeoEngineError, and MissingExtraError when building needs
    packages that are not there.
    """
    if spec is not None:
        return PLANET if spec == "planet" else Path(spec)
    folder = suite_folder() / f"{MODEL.lower()}-random"
    if not (folder / MANIFEST).is_file():
        from geoengine.export.build import build_engines
        from geoengine.export.config import BuildConfig

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GeoEngineError(f"{folder.parent}: cannot be made ({error.strerror or error})") from None
        precisions = ("fp32", "int8") if gpu_name() is None else ("fp32", "fp16", "int8")
        build_engines(
            BuildConfig(
                model=MODEL, pretrained="none", precisions=precisions, input_sizes=(TILE_SIDE,), out=folder
            ),
            progress,
        )
    return folder


class PooledTiles:
    """Every tile of the world, each a different picture: one of a file's 256, marked with its address.

    Reading and decoding cost what they cost for any MBTiles file of JPEG tiles.
    """

    attribution, storable = "", True
    min_zoom, max_zoom = 0, 18

    def __init__(self, file: Path, world: str) -> None:
        self.world = world
        self._pool = MBTilesSource(file)
        self.name, self.identity = self._pool.name, fingerprint("pooled", self._pool.identity)
        self.tile_size, self.bounds = self._pool.tile_size, self._pool.bounds

    def read(self, z: int, xy: NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the pictures of the tiles."""
        for batch in self._pool.read(POOL_ZOOM, pool_xy(z, xy)):
            yield TileBatch(batch.positions, marked(batch.pixels, z, xy[batch.positions]))

    def close(self) -> None:
        """Close the file."""
        self._pool.close()


def pool_xy(z: int, xy: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which of the pool's tiles of `POOL_ZOOM` stand for tiles of a zoom, int64[n, 2] both."""
    mixed = (xy[:, 0] * 73_856_093 ^ xy[:, 1] * 19_349_663 ^ z * 83_492_791) & 0xFFFFFFF
    picture = mixed % (1 << (2 * POOL_ZOOM))
    return np.stack([picture >> POOL_ZOOM, picture & ((1 << POOL_ZOOM) - 1)], axis=1)


def marked(pixels: NDArray[np.uint8], z: int, xy: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return a copy of uint8[n, S, S, 3] in which each picture has its tile's address in the first pixels."""
    marks = np.column_stack([np.full(len(xy), z), xy]).astype("<u4").view(np.uint8)  # (n, 12)
    copy = pixels.copy()
    copy[:, 0, :4] = marks.reshape(-1, 4, 3)
    return copy


def tile_pool(folder: Path | None = None) -> Path:
    """Return an MBTiles file with 256 JPEG pictures of the planet, 256 pixels wide, made the first time.

    Raises OutputError when it cannot be written.
    """
    file = (folder or suite_folder()) / "pool.mbtiles"
    if file.exists():
        return file
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _fill(part)
        part.replace(file)
    except (OSError, sqlite3.Error) as error:
        raise OutputError(f"{file}: cannot be written ({error})") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return file


def _fill(part: Path) -> None:
    import cv2

    part.unlink(missing_ok=True)
    side = 1 << POOL_ZOOM
    with closing(sqlite3.connect(part)) as database, database:
        database.execute("CREATE TABLE metadata (name TEXT, value TEXT)")
        database.execute(
            "CREATE TABLE tiles (zoom_level INT, tile_column INT, tile_row INT, tile_data BLOB, "
            "PRIMARY KEY (zoom_level, tile_column, tile_row))"
        )
        for x, y in all_xy(POOL_ZOOM).tolist():
            picture = planet.tile(POOL_ZOOM, x, y, size=TILE_SIDE)
            data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()
            database.execute("INSERT INTO tiles VALUES (?, ?, ?, ?)", (POOL_ZOOM, x, side - 1 - y, data))


def drawn_places(count: int, seed: int) -> list[LngLat]:
    """Return random places on the planet's land, between 65 degrees south and north."""
    rng = np.random.default_rng(seed)
    found: list[LngLat] = []
    while len(found) < count:
        lng, lat = float(rng.uniform(-180, 180)), float(rng.uniform(-65, 65))
        if planet.is_land([lng], [lat])[0]:
            found.append(LngLat(lng, lat))
    return found


def drawn_photos(count: int, seed: int, side: int = 224) -> Sequence[NDArray[np.uint8]]:
    """Return photos of random places on the planet's land, uint8[h, w, 3]; `side` is the shorter one."""
    return [
        planet.photo(place.lat, place.lng, seed + number, height=side)
        for number, place in enumerate(drawn_places(count, seed))
    ]
