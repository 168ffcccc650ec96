"""What all backends do with pictures before and after the encoder runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.manifest import Variant
from geoengine.engine.preprocess import center_square


def picture_batches(
    bundle: EngineBundle, encoder: str, pixels: NDArray[np.uint8], variant: Variant, limit: int
) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    """Yield uint8[n, S, S, 3] in batches of at most `limit`, each with the trunk graph for its side.

    Pictures of a side that the encoder has no trunk for are first brought to the bundle's image size. Raises
    ValueError for pictures of another type or shape, BundleError for an unknown encoder.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2:] != (pixels.shape[1], 3):
        raise ValueError(f"pixels must be uint8 (n, S, S, 3), got {pixels.dtype} {pixels.shape}")
    trunk = bundle.trunk_path(encoder, pixels.shape[1], variant)
    size = bundle.image_size
    resized = trunk is None
    if trunk is None:
        trunk = bundle.trunk_path(encoder, size, variant)
        assert trunk is not None  # the manifest is checked for it
    for start in range(0, len(pixels), limit):
        batch = pixels[start : start + limit]
        yield trunk, np.stack([center_square(picture, size) for picture in batch]) if resized else batch
