"""The gates of a build: a bundle gives what open_clip gives, whatever else is in the batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import open_clip  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from PIL import Image

from geoengine.engine.backends import Backend
from geoengine.engine.errors import ExportError
from geoengine.export.encoders import EncoderSet
from geoengine.export.pictures import sample_pictures

MIN_COSINE = 0.9999
MAX_BATCH_DIFFERENCE = 1e-5
PICTURES = 32  # a full batch of the CPU backend


@dataclass(frozen=True, slots=True)
class Measurement:
    """One encoder at one picture side: cosines to PyTorch per picture (if compared), pictures per second."""

    encoder: str
    side: int
    cosines: tuple[float, ...]
    images_per_second: float


def measure(
    backend: Backend, encoder: str, side: int, encoders: EncoderSet | None, step: Callable[[str], None]
) -> Measurement:
    """Run an encoder on sample pictures of `side` pixels, and hold it to the gates.

    With `encoders`, it is compared with the open_clip tower of that name in PyTorch, float32, after
    open_clip's own preprocessing (Pillow). `step` is called with what is done. Raises ExportError when a
    cosine is under MIN_COSINE, when an embedding is not of unit length, or when that of a picture differs by
    more than MAX_BATCH_DIFFERENCE alone, first or last in a full batch.
    """
    what = f"encoder {encoder} at {side} px"
    step(f"check {what}")
    pictures = sample_pictures(side, PICTURES)
    pictures[-1] = pictures[0]  # the same picture first and last
    alone = backend.encode(encoder, pictures[:1])  # also loads the graphs, which is not to be timed
    start = time.perf_counter()
    embeddings = backend.encode(encoder, pictures)
    seconds = time.perf_counter() - start
    _check_rows(embeddings, alone, what)
    cosines: tuple[float, ...] = ()
    if encoders is not None:
        expected = reference_embeddings(encoders, encoder, pictures[:-1])
        found = embeddings[:-1].astype(np.float64)
        cosines = tuple(((found * expected).sum(1) / np.linalg.norm(found, axis=1)).tolist())
        if not min(cosines) >= MIN_COSINE:
            raise ExportError(
                f"{what} does not agree with PyTorch: its lowest cosine is {min(cosines):.6f}, "
                f"and {MIN_COSINE} is needed"
            )
    return Measurement(encoder, side, cosines, PICTURES / seconds)


def reference_embeddings(
    encoders: EncoderSet, encoder: str, pictures: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """Return what PyTorch and open_clip's preprocessing make of uint8[n, side, side, 3]: unit rows [n, d]."""
    transform = open_clip.image_transform(
        encoders.image_size, is_train=False, mean=encoders.mean, std=encoders.std, interpolation="bicubic"
    )
    batch = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    with torch.inference_mode():
        embeddings = encoders.towers[encoder](batch).double()
    return np.asarray(torch.nn.functional.normalize(embeddings, dim=-1).numpy())


def _check_rows(full: NDArray[np.float32], alone: NDArray[np.float32], what: str) -> None:
    """Raise ExportError unless rows are of unit length, and first and last of `full` equal `alone`."""
    length = np.linalg.norm(full.astype(np.float64), axis=1)
    if not np.abs(length - 1).max() <= MAX_BATCH_DIFFERENCE:  # also when it is not a number
        raise ExportError(f"{what} gives embeddings that are not of unit length")
    difference = float(np.abs(full[[0, -1]] - alone).max())
    if difference > MAX_BATCH_DIFFERENCE:
        raise ExportError(
            f"{what}: an embedding depends on its batch (alone, first and last differ by {difference:.2g}, "
            f"and at most {MAX_BATCH_DIFFERENCE:.0e} is allowed)"
        )
