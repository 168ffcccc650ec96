"""What all backends do with pictures before and after the encoder runs."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.manifest import Variant
from geoengine.engine.preprocess import to_square
from geoengine.kernels import cosine_topk

Group: TypeAlias = tuple[str, NDArray[np.uint8]]
"""An encoder's name and pictures for it, uint8[n, S, S, 3]."""


@dataclass(frozen=True, slots=True)
class Run:
    """The pictures of a batch, from `start` to before `end`, that go through the head of one encoder."""

    encoder: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """Pictures for one run of a trunk, uint8[n, S, S, 3]; `runs` share them out among the heads, in order."""

    trunk: Path
    pixels: NDArray[np.uint8]
    runs: tuple[Run, ...]

    def shares(self, count: int) -> Iterator[tuple[slice, PictureBatch]]:
        """Yield the rows of `count` parts of almost equal size, and each as a batch of its own."""
        ends = [len(self.pixels) * number // count for number in range(count + 1)]
        for start, end in itertools.pairwise(ends):
            runs = (
                Run(run.encoder, max(run.start, start) - start, min(run.end, end) - start)
                for run in self.runs
                if run.start < end and run.end > start
            )
            yield slice(start, end), PictureBatch(self.trunk, self.pixels[start:end], tuple(runs))


def picture_batches(
    bundle: EngineBundle,
    groups: Sequence[Group],
    variant: Variant,
    limit: int,
    limit_bytes: int | None = None,
) -> Iterator[PictureBatch]:
    """Yield the pictures of all groups, in order, in batches of at most `limit`, each with its trunk graph.

    Groups of equal sides share batches, whatever their encoders. With `limit_bytes`, a batch is also no
    larger than that, but for a single picture. Pictures of a side that the bundle has no trunk for are first
    brought to its image size. Raises ValueError for pictures of another type or shape.
    """
    for _, pixels in groups:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2:] != (pixels.shape[1], 3):
            raise ValueError(f"pixels must be uint8 (n, S, S, 3), got {pixels.dtype} {pixels.shape}")
    parts: list[Group] = []
    count, filled = 0, None
    for encoder, pixels in groups:
        side, size = pixels.shape[1], pixels.shape[1]
        trunk = bundle.trunk_path(side, variant)
        if trunk is None:
            size = bundle.image_size
            trunk = bundle.trunk_path(size, variant)
            assert trunk is not None  # the manifest is checked for it
        room = limit if limit_bytes is None else min(limit, max(1, limit_bytes // (3 * size * size)))
        if filled not in (None, trunk) and parts:
            yield _joined(filled, parts)
            parts, count = [], 0
        filled = trunk
        start = 0
        while start < len(pixels):
            part = pixels[start : start + room - count]
            start, count = start + len(part), count + len(part)
            if size != side:
                part = np.stack([to_square(picture, size) for picture in part])
            parts.append((encoder, part))
            if count == room:
                yield _joined(trunk, parts)
                parts, count = [], 0
    if parts:
        yield _joined(filled, parts)


def _joined(trunk: Path | None, parts: Sequence[Group]) -> PictureBatch:
    assert trunk is not None
    ends = np.cumsum([len(pixels) for _, pixels in parts]).tolist()
    runs = [Run(encoder, end - len(pixels), end) for (encoder, pixels), end in zip(parts, ends, strict=True)]
    pixels = parts[0][1] if len(parts) == 1 else np.concatenate([pixels for _, pixels in parts])
    return PictureBatch(trunk, pixels, tuple(runs))


class HostBackend(ABC):
    """A backend that computes in ordinary memory: what ONNX Runtime and OpenVINO have in common."""

    max_batch: int
    variant: Variant
    _bundle: EngineBundle

    @abstractmethod
    def _encode_batch(self, batch: PictureBatch) -> NDArray[np.float32]: ...

    def encode(self, encoder: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the unit embeddings, float32[n, d], of uint8[n, S, S, 3] pictures; see `Backend`."""
        [embeddings] = self.encode_mixed([(encoder, pixels)])
        return embeddings

    def encode_mixed(self, groups: Sequence[Group]) -> list[NDArray[np.float32]]:
        """Return the embeddings of each group's pictures, float32[n, d]; see `Backend`."""
        for encoder, _ in groups:
            self._head(encoder)  # raises for an unknown encoder
        counts = [len(pixels) for _, pixels in groups]
        embeddings = np.empty((sum(counts), self._bundle.embed_dim), dtype=np.float32)
        done = 0
        for batch in picture_batches(self._bundle, groups, self.variant, self.max_batch):
            embeddings[done : done + len(batch.pixels)] = self._encode_batch(batch)
            done += len(batch.pixels)
        return split_rows(embeddings, counts)

    def rows(self, encoder: str, capacity: int) -> HostRows:
        """Return room for the embeddings of `capacity` pictures of one encoder."""
        return HostRows(self.encode, encoder, capacity)

    def _head(self, encoder: str) -> Path:
        return self._bundle.head_path(encoder, self.variant)


def split_rows(rows: NDArray[np.float32], counts: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return views of consecutive rows, `counts` of them each."""
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    return [rows[end - count : end] for count, end in zip(counts, ends, strict=True)]


class HostRows:
    """Embeddings in ordinary memory, for backends that run on the CPU; see `EmbeddingRows`."""

    def __init__(
        self, encode: Callable[[str, NDArray[np.uint8]], NDArray[np.float32]], encoder: str, capacity: int
    ) -> None:
        self._encode, self._encoder, self._capacity = encode, encoder, capacity
        self._embeddings = np.empty((0, 0), dtype=np.float32)
        self._count = 0

    def append(self, pixels: NDArray[np.uint8], digests: Sequence[bytes] = ()) -> None:
        """Encode uint8[n, S, S, 3] and keep the embeddings as the next n rows."""
        del digests
        embeddings = self._encode(self._encoder, pixels)
        if not self._count:
            # Room for all; pages that stay empty, because tiles turn out equal or missing, are never touched.
            self._embeddings = np.empty((self._capacity, embeddings.shape[1]), dtype=np.float32)
        self._embeddings[self._count : self._count + len(embeddings)] = embeddings
        self._count += len(embeddings)

    def top_k(
        self, queries: NDArray[np.float32], k: int, rows: NDArray[np.int64], segments: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Score each query against its own rows, best first; see `EmbeddingRows`."""
        return cosine_topk(self._embeddings[: self._count], queries, k, rows=rows, segments=segments)

    def download(self) -> NDArray[np.float32]:
        """Return the rows that there are, float32[n, d]; d is 0 while there is none."""
        return self._embeddings[: self._count]
