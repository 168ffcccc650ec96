"""Pillow's antialiased bicubic filter as matrices, so that a graph can resize as Pillow does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FIXED_POINT = 1 << 22  # Pillow rounds the weights of its 8-bit filters to this fraction

WEIGHT_PREFIX = "resize_"


def resizes(name: str) -> bool:
    """Tell by its name whether a graph's weight is part of such a filter; see `Trunk`."""
    return name.startswith(WEIGHT_PREFIX)


def resize_matrix(source: int, target: int) -> NDArray[np.float32]:
    """Return the filter from `source` to `target` pixels along one axis, float32[target, source].

    Formulas: `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c: support of two pixels of
    the coarser side, windows clipped at the edges, rows that sum to one, and rounding to 22 bits.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    matrix = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * scale
        first = max(int(centre - 2.0 * stretch + 0.5), 0)
        last = min(int(centre + 2.0 * stretch + 0.5), source)
        weights = _cubic((np.arange(first, last) - centre + 0.5) / stretch)
        matrix[row, first:last] = weights / weights.sum()
    rounded = np.copysign(np.floor(np.abs(matrix) * _FIXED_POINT + 0.5), matrix) / _FIXED_POINT
    return rounded.astype(np.float32)


def band(matrix: NDArray[np.float32], first: int, count: int) -> tuple[int, NDArray[np.float32]]:
    """Return the part of a filter that target pixels need: its first source, and float32[count, sources]."""
    rows = matrix[first : first + count]
    needed = np.flatnonzero(rows.any(axis=0))
    start, end = int(needed[0]), int(needed[-1]) + 1
    return start, rows[:, start:end]


def _cubic(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """Evaluate the cubic convolution kernel with a = -0.5, which is zero from 2 on."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
