"""Building a tile index on a cluster: each worker embeds whole parts, and writes them itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from geoengine.engine.bulk.engines import EngineSpec
from geoengine.engine.cluster import Cluster
from geoengine.engine.engine import GeoEngine
from geoengine.engine.index.building import Embedder, part_of
from geoengine.engine.index.errors import TileIndexError
from geoengine.engine.index.segments import Ids
from geoengine.engine.index.tile_index import MANIFEST, Maker

_Part: TypeAlias = tuple[int, Ids]


@dataclass(kw_only=True, slots=True)
class EmbedWork:
    """Embeds parts of an index that lies in a folder, and whose embeddings are all of one `maker`."""

    spec: EngineSpec
    folder: Path
    maker: Maker
    _engine: GeoEngine | None = field(default=None, init=False)

    def begin(self) -> None:
        """Open the engine; raises TileIndexError when this machine would compute something else."""
        if not (self.folder / MANIFEST).exists():
            raise TileIndexError(f"{self.folder} is not there: an index must lie on storage that all share")
        engine = self.spec.open()
        there = Maker.of(engine.bundle, engine.source, engine.backend)
        for name, what in (("encoder", "engine bundle"), ("source", "tile source")):
            if getattr(there, name) != getattr(self.maker, name):
                raise TileIndexError(f"the {what} is not the same as where the build was begun")
        if (there.backend, there.variant) != (self.maker.backend, self.maker.variant):
            raise TileIndexError(
                f"{there.backend} {there.variant} would embed the tiles here, and {self.maker.backend} "
                f"{self.maker.variant} elsewhere: choose with --backend and --precision"
            )
        self._engine = engine

    def do(self, task: _Part) -> int:
        """Embed the tiles of a part and write it, and return how many they are."""
        zoom, ids = task
        assert self._engine is not None, "begin comes first"
        if not part_of(self.folder, zoom, ids).exists():
            embedder = Embedder(self.folder, self._engine.source, self._engine.backend, self.maker.width)
            embedder.embed_part(zoom, ids, lambda done: None)
        return len(ids)


@dataclass(frozen=True, slots=True)
class SpreadEmbedder:
    """Embeds parts on the workers of a cluster."""

    cluster: Cluster
    work: EmbedWork

    @classmethod
    def of(cls, cluster: Cluster, spec: EngineSpec, folder: Path, maker: Maker) -> SpreadEmbedder:
        """Return what embeds into a folder with the engine of `spec`."""
        own = replace(spec, threads=cluster.workers.cpus)
        return cls(cluster, EmbedWork(spec=own, folder=folder.absolute(), maker=maker))

    def embed(self, zoom: int, parts: Sequence[Ids], note: Callable[[int], None]) -> None:
        """Embed parts; see `Embed`."""
        done = 0
        for count in self.cluster.map(self.work, [(zoom, ids) for ids in parts]) if parts else ():
            done += count
            note(done)
