"""What all backends do with pictures before and after the encoder runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.manifest import Variant
from geoengine.engine.preprocess import to_square
from geoengine.kernels import cosine_topk


def picture_batches(
    bundle: EngineBundle, pixels: NDArray[np.uint8], variant: Variant, limit: int
) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    """Yield uint8[n, S, S, 3] in batches of at most `limit`, each with the trunk graph for its side.

    Pictures of a side that the bundle has no trunk for are first brought to its image size. Raises ValueError
    for pictures of another type or shape.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2:] != (pixels.shape[1], 3):
        raise ValueError(f"pixels must be uint8 (n, S, S, 3), got {pixels.dtype} {pixels.shape}")
    trunk = bundle.trunk_path(pixels.shape[1], variant)
    size = bundle.image_size
    resized = trunk is None
    if trunk is None:
        trunk = bundle.trunk_path(size, variant)
        assert trunk is not None  # the manifest is checked for it
    for start in range(0, len(pixels), limit):
        batch = pixels[start : start + limit]
        yield trunk, np.stack([to_square(picture, size) for picture in batch]) if resized else batch


class HostBackend(ABC):
    """A backend that computes in ordinary memory: what ONNX Runtime and OpenVINO have in common."""

    max_batch: int
    variant: Variant
    _bundle: EngineBundle

    @abstractmethod
    def _encode_batch(self, trunk: Path, head: Path, batch: NDArray[np.uint8]) -> NDArray[np.float32]: ...

    def encode(self, encoder: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the unit embeddings, float32[n, d], of uint8[n, S, S, 3] pictures; see `Backend`.

        Pictures of a side that the bundle has no trunk for are first brought to its image size.
        """
        head = self._bundle.head_path(encoder, self.variant)
        embeddings = np.empty((len(pixels), self._bundle.embed_dim), dtype=np.float32)
        done = 0
        for trunk, batch in picture_batches(self._bundle, pixels, self.variant, self.max_batch):
            embeddings[done : done + len(batch)] = self._encode_batch(trunk, head, batch)
            done += len(batch)
        return embeddings

    def rows(self, encoder: str, capacity: int) -> HostRows:
        """Return room for the embeddings of `capacity` pictures of one encoder."""
        return HostRows(self.encode, encoder, capacity)


class HostRows:
    """Embeddings in ordinary memory, for backends that run on the CPU; see `EmbeddingRows`."""

    def __init__(
        self, encode: Callable[[str, NDArray[np.uint8]], NDArray[np.float32]], encoder: str, capacity: int
    ) -> None:
        self._encode, self._encoder, self._capacity = encode, encoder, capacity
        self._embeddings = np.empty((0, 0), dtype=np.float32)
        self._count = 0

    def append(self, pixels: NDArray[np.uint8]) -> None:
        """Encode uint8[n, S, S, 3] and keep the embeddings as the next n rows."""
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
