"""How an engine is opened, said such that another process, on another machine, opens the same one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from geoengine.engine.engine import GeoEngine
from geoengine.engine.index.known_rows import row_cache_folder
from geoengine.engine.sources import TileSource, open_source
from geoengine.engine.sources.nothing import NoTiles


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """The arguments of `GeoEngine.open`; with `keeps_rows`, tiles' embeddings are kept for later searches."""

    bundle: str
    tiles: str | None
    index: Path | None
    backend: str
    precision: str | None
    threads: int | None
    keeps_rows: bool

    def open(self, *, rows: Path | None = None) -> GeoEngine:
        """Open the engine; raises GeoEngineError.

        `rows` is the folder in which embeddings of tiles are kept where they have no other place.
        """
        return GeoEngine.open(
            self.bundle,
            self.tiles,
            backend=self.backend,
            precision=self.precision,
            threads=self.threads,
            index=self.index,
            row_cache=(row_cache_folder() if self.keeps_rows else None) or rows,
        )

    def source(self, world: str) -> TileSource:
        """Open the tile source alone, for a bundle of a world; raises GeoEngineError."""
        if self.tiles is None and world != "planet":
            return NoTiles(world)
        return open_source(self.tiles or world)


def anywhere(spec: str) -> str:
    """Return the name of a bundle or a tile source such that it means the same in another folder."""
    path = Path(spec).expanduser()
    return str(path.absolute()) if spec != "planet" and path.exists() else spec
