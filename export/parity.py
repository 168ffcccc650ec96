"""The gates of a build: a backend gives what PyTorch gives, whatever else is in the batch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import Backend
from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.reference import check_pictures

MIN_COSINE = {Variant.fp32: 0.9999, Variant.fp16: 0.9999, Variant.fp16_attention: 0.9999, Variant.int8: 0.995}
"""The least cosine to PyTorch fp32 of any picture."""

MAX_BATCH_DIFFERENCE = 1e-6
MAX_HALF_BATCH_DIFFERENCE = 1e-3
"""How much a component of an embedding may depend on what else is in the batch: with float32 sums, and where
products are rounded to float16 (other batch sizes add in another order). Components are about 0.05."""

_UNIT = 1e-5
_REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One encoder at one picture side, run by one backend.

    `cosines` are to PyTorch, one per picture; speed is in pictures per second of trunk and head together, on
    this machine.
    """

    backend: str
    variant: Variant
    encoder: str
    side: int
    cosines: tuple[float, ...]
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        """Read what `to_dict` returned, perhaps through JSON."""
        return cls(**{**values, "variant": Variant(values["variant"]), "cosines": tuple(values["cosines"])})


def measure(backend: Backend, encoder: str, side: int, expected: NDArray[np.float32]) -> Measurement:
    """Run an encoder on test pictures of `side` pixels, alone and in batches, and hold it to the gates.

    `expected` are PyTorch's embeddings of `check_pictures(side)`. Raises ExportError when a cosine is under
    MIN_COSINE, when an embedding is not of unit length, or when that of a picture differs by more than is
    allowed alone, first and last in a full batch and in the largest.
    """
    what = f"encoder {encoder} at {side} px on {backend.name} ({backend.variant})"
    pictures = check_pictures(side)
    alone = backend.encode(encoder, pictures[:1])  # also loads the graphs, which is not to be timed
    # A GPU first runs a batch of a size plainly, then records it, then plays the record.
    for _ in range(_REPEATS):
        _check_rows(backend.encode(encoder, pictures[:1]), alone, backend.variant, what)
    largest = _repeated(pictures, backend.max_batch)
    if backend.max_batch > len(pictures):
        _check_rows(backend.encode(encoder, largest), alone, backend.variant, what)
    full = _repeated(pictures, max(len(pictures), backend.batch))
    for _ in range(_REPEATS if backend.batch > len(pictures) else 0):
        _check_rows(backend.encode(encoder, full), alone, backend.variant, what)
    start = time.perf_counter()
    embeddings = backend.encode(encoder, full)
    seconds = time.perf_counter() - start
    _check_rows(embeddings, alone, backend.variant, what)
    return Measurement(
        backend=backend.name,
        variant=backend.variant,
        encoder=encoder,
        side=side,
        cosines=_cosines(embeddings, expected, backend.variant, what),
        images_per_second=len(full) / seconds,
    )


def _repeated(pictures: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Return `count` pictures, the first of them again at the end."""
    repeated = pictures[np.arange(count) % len(pictures)]
    repeated[-1] = pictures[0]
    return repeated


def _cosines(
    embeddings: NDArray[np.float32], expected: NDArray[np.float32], variant: Variant, what: str
) -> tuple[float, ...]:
    """Return the cosine of each distinct picture; raises ExportError when one is too low."""
    distinct = min(len(expected), len(embeddings) - 1)  # the last picture is the first again
    found = embeddings[:distinct].astype(np.float64)
    cosines = ((found * expected[:distinct]).sum(1) / np.linalg.norm(found, axis=1)).tolist()
    needed = MIN_COSINE[variant]
    if not min(cosines) >= needed:
        raise ExportError(
            f"{what} does not agree with PyTorch: its lowest cosine is {min(cosines):.6f}, "
            f"and {needed} is needed"
        )
    return tuple(cosines)


def _check_rows(full: NDArray[np.float32], alone: NDArray[np.float32], variant: Variant, what: str) -> None:
    """Raise ExportError unless rows are of unit length, and first and last of `full` equal `alone`."""
    length = np.linalg.norm(full.astype(np.float64), axis=1)
    if not np.abs(length - 1).max() <= _UNIT:  # also when it is not a number
        raise ExportError(f"{what} gives embeddings that are not of unit length")
    half = variant in (Variant.fp16, Variant.fp16_attention)
    allowed = MAX_HALF_BATCH_DIFFERENCE if half else MAX_BATCH_DIFFERENCE
    difference = float(np.abs(full[[0, -1]] - alone).max())
    if difference > allowed:
        raise ExportError(
            f"{what}: an embedding depends on its batch (alone, first and last differ by {difference:.2g}, "
            f"and at most {allowed:.0e} is allowed)"
        )
