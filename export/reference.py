"""What PyTorch makes of the test pictures: the numbers that every compiled encoder is held to.

A bundle carries them (`reference.npz`), so that it can be checked again on machines without PyTorch.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import PHOTO
from geoengine.export.pictures import sample_pictures

if TYPE_CHECKING:
    from geoengine.export.encoders import EncoderSet

REFERENCE = "reference.npz"
PICTURES = 32
"""Test pictures of each side."""

Reference = Mapping[tuple[str, int], NDArray[np.float32]]
"""Unit embeddings float32[PICTURES, d] of `check_pictures(side)`, by encoder and side."""


def check_pictures(side: int) -> NDArray[np.uint8]:
    """Return the pictures that builds are checked with, uint8[PICTURES, side, side, 3]."""
    return sample_pictures(side, PICTURES)


def checked_pairs(encoders: tuple[str, ...], sides: tuple[int, ...], own: int) -> list[tuple[str, int]]:
    """Return which encoder is checked at which side: the photo encoder at all, the others at their own.

    A head does not know the side that its tokens came from, so this runs every graph.
    """
    return [(PHOTO, side) for side in sides] + [(name, own) for name in encoders if name != PHOTO]


def make_reference(
    encoders: EncoderSet, pairs: list[tuple[str, int]], step: Callable[[str], None]
) -> dict[tuple[str, int], NDArray[np.float32]]:
    """Run the open_clip towers in PyTorch, float32, after open_clip's own preprocessing (Pillow)."""
    reference = {}
    for encoder, side in pairs:
        step(f"run encoder {encoder} in PyTorch at {side} px")
        reference[encoder, side] = reference_embeddings(encoders, encoder, check_pictures(side))
    return reference


def reference_embeddings(
    encoders: EncoderSet, encoder: str, pictures: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Return PyTorch's unit embeddings, float32[n, d], of square pictures, uint8[n, side, side, 3]."""
    import open_clip  # type: ignore[import-untyped]
    import torch
    from PIL import Image

    transform = open_clip.image_transform(
        encoders.image_size,
        is_train=False,
        mean=encoders.mean,
        std=encoders.std,
        interpolation="bicubic",
        resize_mode=encoders.resize_mode,
    )
    batch = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    with torch.inference_mode():
        embeddings = encoders.towers[encoder](batch).double()
    return np.asarray(torch.nn.functional.normalize(embeddings, dim=-1).float().numpy())


def save_reference(reference: Reference, file: Path) -> None:
    """Write the embeddings, and a digest of the pictures that they belong to."""
    sides = sorted({side for _, side in reference})
    arrays = {f"{encoder}.{side}": embeddings for (encoder, side), embeddings in reference.items()}
    digests = {f"pictures.{side}": np.frombuffer(_digest(side), dtype=np.uint8) for side in sides}
    np.savez(file, **arrays, **digests)  # type: ignore[arg-type]  # numpy types the keywords as bool


def load_reference(file: Path) -> dict[tuple[str, int], NDArray[np.float32]]:
    """Read what `save_reference` wrote; raises ExportError for a damaged file and for other test pictures."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            stored = dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ExportError(f"{file} cannot be read ({error}): build the bundle again") from error
    reference = {}
    for name, array in stored.items():
        kind, _, side = name.partition(".")
        if kind != "pictures":
            reference[kind, int(side)] = array
        elif array.tobytes() != _digest(int(side)):
            raise ExportError(
                f"{file} belongs to other test pictures than this version draws: build the bundle again"
            )
    return reference


def _digest(side: int) -> bytes:
    return hashlib.sha256(check_pictures(side).tobytes()).digest()
