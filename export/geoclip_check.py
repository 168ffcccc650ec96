"""The gates of GeoCLIP's location encoder and gallery; they need neither PyTorch nor the package."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import ExportError
from geoengine.engine.geoclip.gallery import Gallery
from geoengine.engine.geoclip.locations import LocationEncoder

REFERENCE = "location_reference.npy"
"""Points, longitude and latitude, with PyTorch's embeddings: float64[n, 2 + d]."""

MIN_COSINE = 0.9999
"""The least cosine of a point's embedding to PyTorch's."""

_GALLERY_POINTS = 256
_SEED = 40


def check_points() -> NDArray[np.float64]:
    """Return the points that builds are checked with, float64[n, 2] in degrees: a grid, and random ones."""
    rng = np.random.default_rng(_SEED)
    grid = np.stack(np.meshgrid(np.linspace(-180, 180, 13), np.linspace(-85, 85, 9)), axis=-1)
    anywhere = rng.uniform((-180, -85), (180, 85), (139, 2))
    return np.concatenate([grid.reshape(-1, 2), anywhere])


def check_geoclip(bundle: EngineBundle) -> dict[str, Any]:
    """Hold location encoder and gallery to their gates; returns figures for the manifest.

    The encoder must agree with the numbers that the bundle carries, and some of the gallery's embeddings with
    the encoder. Raises ExportError.
    """
    try:
        reference = np.load(bundle.path / REFERENCE, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ExportError(
            f"{bundle.path / REFERENCE} cannot be read ({error}): build GeoCLIP again"
        ) from error
    points, expected = reference[:, :2], reference[:, 2:]
    encoder = LocationEncoder.open(bundle)
    encoder.embed_plain(points[:1])  # loads the graph, which is not to be timed
    gallery = Gallery.open(bundle)
    rows = np.random.default_rng(_SEED).permutation(len(gallery.points))[:_GALLERY_POINTS]
    start = time.perf_counter()
    location = _figures(encoder.embed_plain(points), expected, "the location encoder", "PyTorch", start)
    start = time.perf_counter()
    again = encoder.embed(gallery.points[rows])
    stored = gallery.embeddings[rows].astype(np.float32)
    return {
        "location": location,
        "gallery": _figures(again, stored, "the gallery", "the location encoder", start),
    }


def _figures(
    found: NDArray[np.floating], expected: NDArray[np.floating], what: str, other: str, start: float
) -> dict[str, Any]:
    """Return the figures of a check that took since `start`; raises ExportError when a cosine is too low."""
    seconds = time.perf_counter() - start
    lengths = np.linalg.norm(found.astype(np.float64), axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (found.astype(np.float64) * expected).sum(axis=1) / lengths
    if not cosines.min() >= MIN_COSINE:  # also when it is not a number
        raise ExportError(
            f"{what} does not agree with {other}: its lowest cosine is {cosines.min():.6f}, "
            f"and {MIN_COSINE} is needed"
        )
    return {
        "min_cosine": round(float(cosines.min()), 8),
        "mean_cosine": round(float(cosines.mean()), 8),
        "points": len(cosines),
        "points_per_second": round(len(cosines) / seconds, 1),
    }
