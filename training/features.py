"""What the frozen layers make of tiles and photos: computed once and kept on disk, or at every request.

Blocks 0 to 9 of the map encoders and the whole photo encoder never change in training. With their output on
disk, an epoch runs two blocks only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from geoengine.engine.preprocess import to_square
from geoengine.engine.readahead import ReadAhead
from geoengine.engine.sources import TileSource, fingerprint
from geoengine.training.errors import TrainingError
from geoengine.training.negatives import Keys, tiles_of_keys
from geoengine.training.photos import Photos
from geoengine.training.processes import Processes, autocast
from geoengine.training.rows import Half, RowStore
from geoengine.training.towers import Tower, trunk_tokens

Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]
Progress: TypeAlias = Callable[[str, int, int], None]
"""(what is done, done so far, in all)."""

_CHUNK = 256  # pictures read and encoded together; a resumed run must cut its list into the same chunks


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frozen:
    """The layers that are not trained: the photo encoder, whose first `trunk_layers` blocks are the trunk.

    `digest` tells its weights from others, `mean` and `std` are per channel of pixels in 0 to 1.
    """

    tower: Tower
    trunk_layers: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: str
    device: torch.device
    precision: str

    @property
    def identity(self) -> str:
        """A name of what its output depends on besides the pictures: weights, mean and std, precision."""
        return f"{fingerprint(self.digest, *map(str, (*self.mean, *self.std)))[:16]}-{self.precision}"

    @property
    def side(self) -> int:
        """The side of the encoder's pictures in pixels."""
        size = self.tower.image_size
        return int(size[0])

    @property
    def token_shape(self) -> tuple[int, int]:
        """The number and length of a picture's tokens."""
        count, width = self.tower.positional_embedding.shape
        return int(count), int(width)

    def tokens(self, pixels: UInt8Array) -> torch.Tensor:
        """Run the trunk: uint8[n, S, S, 3] to float16[n, T, width] on the device."""
        with torch.no_grad(), autocast(self.device, self.precision):
            tokens = trunk_tokens(self.tower, self._images(pixels), self.trunk_layers)
        if not bool(torch.isfinite(half := tokens.half()).all()):
            raise TrainingError("the trunk's activations exceed float16: these weights cannot be trained")
        return half

    def embeddings(self, pixels: UInt8Array) -> torch.Tensor:
        """Run the photo encoder: uint8[n, S, S, 3] to unit embeddings float16[n, d] on the device."""
        with torch.no_grad(), autocast(self.device, self.precision):
            return F.normalize(self.tower(self._images(pixels)).float(), dim=1).half()

    def _images(self, pixels: UInt8Array) -> torch.Tensor:
        if pixels.shape[1] != self.side:
            pixels = np.stack([to_square(picture, self.side) for picture in pixels])
        images = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device).permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (self.mean, self.std))
        return ((images / 255 - mean) / std).contiguous()


class TileFeatures(Protocol):
    """The trunk's tokens of tiles, by zoom and key (see `negatives.tile_keys`)."""

    def prepare(self, zoom: int, keys: Keys) -> None:
        """Find out about tiles, sorted and distinct, before they are asked for."""
        ...

    def present(self, zoom: int, keys: Keys) -> npt.NDArray[np.bool_]:
        """Tell which of the prepared tiles exist, bool[n]."""
        ...

    def tokens(self, zoom: int, keys: Keys) -> torch.Tensor:
        """Return the tokens of tiles that exist, float16[n, T, width] on the device."""
        ...


class CachedTiles:
    """Tokens that are computed once and kept in a folder, for all runs with the same trunk and tiles."""

    def __init__(
        self, frozen: Frozen, source: TileSource, cache: Path, processes: Processes, progress: Progress
    ) -> None:
        if not source.storable:
            raise TrainingError(
                f"the terms of the tile source {source.name} forbid keeping what is computed from its "
                "tiles: train with --no-cache"
            )
        self._frozen, self._source, self._processes, self._progress = frozen, source, processes, progress
        name = f"{frozen.identity}-{frozen.trunk_layers}-{source.identity[:16]}"
        self._folder = cache / "tiles" / name
        self._stores: dict[int, RowStore] = {}

    def missing_bytes(self, zoom: int, keys: Keys) -> int:
        """Return how much of the disk the tokens of these tiles need that are not there yet."""
        store = self._store(zoom)
        return int((~store.known(keys)).sum()) * store.row_bytes

    def prepare(self, zoom: int, keys: Keys) -> None:
        """Compute and keep what is missing; the processes share the work."""
        store = self._store(zoom)
        store.refresh()  # other runs may have added some
        chunks = _unknown_chunks(store, keys, self._processes)
        said = f"zoom {zoom}: trunk activations"

        def read() -> Iterator[tuple[Int64Array, Int64Array, UInt8Array | None]]:
            for chunk in chunks:
                positions, pixels = read_tiles(self._source, zoom, keys[chunk])
                yield chunk, positions, pixels

        with store, ReadAhead(read, depth=2) as ahead:
            for done, (chunk, positions, pixels) in enumerate(_items(ahead)):
                rows = np.empty((0, *self._frozen.token_shape), np.float16)
                if pixels is not None:
                    rows = self._frozen.tokens(pixels).cpu().numpy()
                _add(store, keys[chunk], positions, rows)
                self._progress(said, done + 1, len(chunks))
        self._processes.wait()
        store.refresh()

    def present(self, zoom: int, keys: Keys) -> npt.NDArray[np.bool_]:
        """Tell which of the prepared tiles exist, bool[n]."""
        return self._store(zoom).present(keys)

    def tokens(self, zoom: int, keys: Keys) -> torch.Tensor:
        """Return the tokens of tiles that exist, float16[n, T, width] on the device."""
        return torch.from_numpy(self._store(zoom).get(keys)).to(self._frozen.device)

    def _store(self, zoom: int) -> RowStore:
        if zoom not in self._stores:
            self._stores[zoom] = RowStore(self._folder / f"z{zoom:02d}", self._frozen.token_shape)
        return self._stores[zoom]


class ComputedTiles:
    """Tokens that are computed whenever they are asked for, and kept nowhere."""

    def __init__(self, frozen: Frozen, source: TileSource) -> None:
        self._frozen, self._source = frozen, source
        self._there: dict[int, Keys] = {}

    def prepare(self, zoom: int, keys: Keys) -> None:
        """Read the tiles once, to know which exist."""
        positions, _ = read_tiles(self._source, zoom, keys, keep=False)
        self._there[zoom] = np.union1d(self._there.get(zoom, keys[:0]), keys[positions])

    def present(self, zoom: int, keys: Keys) -> npt.NDArray[np.bool_]:
        """Tell which of the prepared tiles exist, bool[n]."""
        return np.isin(keys, self._there[zoom])

    def tokens(self, zoom: int, keys: Keys) -> torch.Tensor:
        """Return the tokens of tiles that exist, float16[n, T, width] on the device."""
        order, inverse = np.unique(keys, return_inverse=True)
        positions, pixels = read_tiles(self._source, zoom, order)
        if pixels is None or len(positions) < len(order):
            raise TrainingError(
                f"tile source {self._source.name} no longer gives tiles of zoom {zoom} that it gave before: "
                "give the same command again, or train with a cache"
            )
        return self._frozen.tokens(pixels)[torch.from_numpy(inverse.reshape(-1)).to(self._frozen.device)]


def read_tiles(
    source: TileSource, zoom: int, keys: Keys, *, keep: bool = True
) -> tuple[Int64Array, UInt8Array | None]:
    """Read tiles and return the sorted positions of those that exist and their pixels uint8[n, S, S, 3].

    The pixels are None where no tile exists, and without `keep`.
    """
    batches = []
    for batch in source.read(zoom, tiles_of_keys(keys)):
        batches.append((batch.positions, batch.pixels if keep else batch.pixels[:0]))
    if not batches:
        return np.empty(0, np.int64), None
    positions = np.concatenate([part for part, _ in batches])
    order = np.argsort(positions)
    return positions[order], np.concatenate([pixels for _, pixels in batches])[order] if keep else None


class PhotoFeatures(Protocol):
    """Embeddings of a split's photos."""

    def prepare(self) -> npt.NDArray[np.bool_]:
        """Find out which photos can be read; bool[m]."""
        ...

    def embeddings(self, rows: Int64Array) -> torch.Tensor:
        """Return the unit embeddings of photos, float32[n, d] on the device."""
        ...


class CachedPhotos:
    """Embeddings that are computed once and kept in a folder."""

    def __init__(
        self, frozen: Frozen, photos: Photos, cache: Path, processes: Processes, progress: Progress
    ) -> None:
        self._frozen, self._photos, self._processes, self._progress = frozen, photos, processes, progress
        folder = f"{frozen.identity}-{photos.identity[:60]}"
        dim = int(frozen.tower.proj.shape[1])
        self._store = RowStore(cache / "photos" / folder, (dim,))

    def prepare(self) -> npt.NDArray[np.bool_]:
        """Compute and keep what is missing; the processes share the work."""
        keys = self._photos.keys
        chunks = _unknown_chunks(self._store, keys, self._processes)
        with self._store:
            for done, chunk in enumerate(chunks):
                read = list(self._photos.read(chunk))
                positions = np.concatenate([part for part, _ in read] or [chunk[:0]])
                rows = [self._frozen.embeddings(pixels).cpu().numpy() for _, pixels in read]
                empty = np.empty((0, int(self._frozen.tower.proj.shape[1])), np.float16)
                _add(self._store, keys[chunk], positions, np.concatenate([empty, *rows]))
                self._progress("photo embeddings", done + 1, len(chunks))
        self._processes.wait()
        self._store.refresh()
        return self._store.present(keys)

    def embeddings(self, rows: Int64Array) -> torch.Tensor:
        """Return the unit embeddings of photos, float32[n, d] on the device."""
        found = self._store.get(self._photos.keys[rows])
        return torch.from_numpy(found).to(self._frozen.device).float()


class ComputedPhotos:
    """Embeddings that are computed whenever they are asked for."""

    def __init__(self, frozen: Frozen, photos: Photos) -> None:
        self._frozen, self._photos = frozen, photos

    def prepare(self) -> npt.NDArray[np.bool_]:
        """Read all photos once, to know which can be read."""
        there = np.zeros(len(self._photos.keys), dtype=bool)
        for positions, _ in self._photos.read(np.arange(len(there))):
            there[positions] = True
        return there

    def embeddings(self, rows: Int64Array) -> torch.Tensor:
        """Return the unit embeddings of photos, float32[n, d] on the device."""
        parts = [self._frozen.embeddings(pixels) for _, pixels in self._photos.read(rows)]
        return torch.cat(parts).float()


def check_room(cache: Path, wanted: int) -> None:
    """Raise TrainingError when the disk of the folder `cache` has less than `wanted` bytes free."""
    folder = cache
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise TrainingError(
            f"the trunk's activations need {wanted / 1e9:.1f} GB more in {cache}, which has {free / 1e9:.1f} "
            "GB free: name another folder with --cache, or compute them each time with --no-cache"
        )


def _unknown_chunks(store: RowStore, keys: Keys, processes: Processes) -> list[Int64Array]:
    """Return the chunks of `keys`, as row numbers, of which something is missing and which are ours."""
    known = store.known(keys)
    chunks = [np.arange(start, min(start + _CHUNK, len(keys))) for start in range(0, len(keys), _CHUNK)]
    return [chunk for chunk in chunks[processes.rank :: processes.count] if not known[chunk].all()]


def _add(store: RowStore, keys: Keys, positions: Int64Array, rows: Half) -> None:
    """Keep the rows of the keys at `positions`, and that the others have none; not what is there already."""
    new = ~store.known(keys)
    there = np.zeros(len(keys), dtype=bool)
    there[positions] = True
    store.add(keys[there & new], rows[new[positions]], keys[~there & new])


def _items(
    ahead: ReadAhead[tuple[Int64Array, Int64Array, UInt8Array | None]],
) -> Iterator[tuple[Int64Array, Int64Array, UInt8Array | None]]:
    while True:
        try:
            yield ahead.take()
        except StopIteration:
            return
