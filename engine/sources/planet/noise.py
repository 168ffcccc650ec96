"""Hashed value noise: everything random on the planet is a function of integers, never of state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def hash_integers(*keys: int | npt.NDArray[np.integer]) -> UInt64Array:
    """Mix integers into well-spread 64-bit numbers (the finaliser of SplitMix64, once per key).

    `keys` broadcast against each other, Python integers first; the answer is uint64 of their common shape, at
    least 1-d. Reference: G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number generators, 2014.
    """
    seed, mixed = 0x9E3779B97F4A7C15, 0
    for key in keys:
        if not isinstance(key, int):
            break
        seed = _mix(seed ^ (key & _MASK))  # a plain integer is mixed faster outside NumPy
        mixed += 1
    state = np.full(1, seed, dtype=np.uint64)
    for key in keys[mixed:]:
        state = state ^ np.asarray(key, dtype=np.int64).view(np.uint64)
        state ^= state >> _SHIFTS[0]
        state *= _FACTORS[0]
        state ^= state >> _SHIFTS[1]
        state *= _FACTORS[1]
        state ^= state >> _SHIFTS[2]
    return state


def _mix(state: int) -> int:
    state = (state ^ (state >> 30)) * int(_FACTORS[0]) & _MASK
    state = (state ^ (state >> 27)) * int(_FACTORS[1]) & _MASK
    return state ^ (state >> 31)


def hash_unit(*keys: int | npt.NDArray[np.integer]) -> Float32Array:
    """Hash integers to float32 numbers in [0, 1)."""
    return ((hash_integers(*keys) >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


def bspline_weights(fraction: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return the uniform cubic B-spline weights, `[..., 4]`, at `fraction` in [0, 1); they sum to one."""
    t = fraction[..., None]
    u = 1.0 - t
    parts = (u**3, 3 * t**3 - 6 * t**2 + 4, 3 * u**3 - 6 * u**2 + 4, t**3)
    return np.concatenate(parts, axis=-1) / 6.0


@lru_cache(maxsize=256)
def bspline_matrix(start: float, step: float, count: int) -> tuple[int, Float32Array]:
    """Resampling matrix from lattice values to `count` samples at `start + step * (i + 0.5)` lattice units.

    Returns the first lattice index and a float32 `[count, taps]` matrix.
    """
    position = start + step * (np.arange(count) + 0.5)
    floor = np.floor(position).astype(np.int64)
    first = int(floor[0]) - 1
    matrix = np.zeros((count, int(floor[-1]) + 3 - first), dtype=np.float32)
    columns = (floor - 1 - first)[:, None] + np.arange(4)
    np.put_along_axis(matrix, columns, bspline_weights(position - floor).astype(np.float32), axis=1)
    return first, matrix


def lattice_values(key: int, level: int, columns: Int64Array, rows: Int64Array) -> Float32Array:
    """Random lattice values in [-1, 1) at integer columns and rows, broadcast together."""
    return hash_unit(key, level, columns, rows) * np.float32(2) - np.float32(1)
