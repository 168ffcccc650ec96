"""The laws of the planet: which colours a place has at each scale, and where there is land."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geoengine.engine.sources.planet.noise import (
    Float32Array,
    Int64Array,
    bspline_matrix,
    bspline_weights,
    hash_integers,
    hash_unit,
    lattice_values,
)

ATTRIBUTE_LEVELS = (2, 4, 6, 8, 10, 12, 14, 16)
JITTER = 0.25  # of a stratum; siblings then differ by at least 45 degrees in one of their two hues

_OCTAVES = range(2, 13)  # lattice of 2^octave cells around the world; the finest is 9.8 km at the equator
_SEA_LEVEL = 0.02
_KEY_STRATUM, _KEY_ROTATION, _KEY_JITTER, _KEY_ELEVATION = 1, 2, 3, 4
# A cubic B-spline over values in [-1, 1] has a slope of at most 2 per lattice cell along an axis.
_SLOPE_PER_AXIS = 2.0


@dataclass(frozen=True, slots=True)
class World:
    """A planet; equal seeds give equal planets.

    A *cell* of level L is the tile of zoom L. Each cell has two hues, `a` and `b`, in turns [0, 1): the 16
    siblings of a parent are a hashed permutation of 4 x 4 strata of the two hue circles, turned by a hashed
    angle of the parent, with jitter. So siblings always differ, and cousins rarely agree.
    """

    seed: int = 7

    def hues(self, level: int, xy: Int64Array) -> Float32Array:
        """Hues of the cells `xy` (int64[n, 2]) of `level`, as float32[n, 2] turns in [0, 1)."""
        x, y = xy[:, 0], xy[:, 1] % (1 << level)
        x = x % (1 << level)
        parent_x, parent_y = x >> 2, y >> 2
        child = (x & 3) * 4 + (y & 3)
        order = hash_integers(
            self.seed, _KEY_STRATUM, level, parent_x[:, None], parent_y[:, None], np.arange(16)
        )
        own = np.take_along_axis(order, child[:, None], axis=1)
        stratum = (order < own).sum(axis=1)
        strata = np.stack([stratum >> 2, stratum & 3], axis=1)
        axis = np.arange(2)
        rotation = hash_unit(self.seed, _KEY_ROTATION, level, parent_x[:, None], parent_y[:, None], axis)
        jitter = hash_unit(self.seed, _KEY_JITTER, level, x[:, None], y[:, None], axis) * 2 - 1
        return ((rotation + (strata + 0.5 + JITTER * jitter) / 4) % 1.0).astype(np.float32)

    def ancestor_hues(self, level: int, xy: Int64Array) -> Float32Array:
        """Hues of the cells and of all cells they lie in, float32[n, level / 2, 2], levels 2, 4 … `level`."""
        return np.stack([self.hues(up, xy >> (level - up)) for up in range(2, level + 1, 2)], axis=1)

    def elevation(self, u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> Float32Array:
        """Height above the sea, about [-1, 1], at world coordinates in [0, 1): u eastwards, v southwards.

        `u` and `v` are float64[n]; the answer is float32[n].
        """
        total = np.full(u.shape, -_SEA_LEVEL, dtype=np.float32)
        taps = np.arange(-1, 3)
        for octave in _OCTAVES:
            size = 1 << octave
            column, row = u * size, v * size
            column_floor, row_floor = np.floor(column).astype(np.int64), np.floor(row).astype(np.int64)
            values = lattice_values(
                self.seed * 64 + _KEY_ELEVATION,
                octave,
                (column_floor[:, None, None] + taps) % size,
                row_floor[:, None, None] + taps[:, None],
            )  # (n, 4 rows, 4 columns)
            weight_x, weight_y = bspline_weights(column - column_floor), bspline_weights(row - row_floor)
            total += _amplitude(octave) * np.einsum("nij,ni,nj->n", values, weight_y, weight_x).astype(
                np.float32
            )
        return total

    def elevation_grid(self, zoom: int, x: int, y: int, size: int) -> Float32Array:
        """Height at a tile's pixel centres, float32[size, size]; octaves under two pixels are left out."""
        total = np.full((size, size), -_SEA_LEVEL, dtype=np.float32)
        for octave in _OCTAVES:
            if octave - zoom > math.log2(size) - 1:
                break
            cells = 2.0 ** (octave - zoom)  # lattice cells per tile
            step = cells / size
            phase_x, phase_y = (x * cells) % 1.0, (y * cells) % 1.0
            first_x, matrix_x = bspline_matrix(phase_x, step, size)
            first_y, matrix_y = bspline_matrix(phase_y, step, size)
            columns = (math.floor(x * cells) + first_x + np.arange(matrix_x.shape[1])) % (1 << octave)
            rows = math.floor(y * cells) + first_y + np.arange(matrix_y.shape[1])
            values = lattice_values(self.seed * 64 + _KEY_ELEVATION, octave, columns, rows[:, None])
            total += _amplitude(octave) * (matrix_y @ values @ matrix_x.T)
        return total

    def land_kind(self, zoom: int, xy: Int64Array) -> npt.NDArray[np.int8]:
        """Return 1 for tiles of land alone, -1 for sea alone, 0 where there may be both; int8[n]."""
        scale = 1.0 / (1 << zoom)
        middle = (xy + np.float64(0.5)) * scale
        height = self.elevation(middle[:, 0], middle[:, 1])
        margin = sum(
            _amplitude(octave) * min(2.0, _SLOPE_PER_AXIS * scale * (1 << octave)) for octave in _OCTAVES
        )
        return (height > margin).astype(np.int8) - (height < -margin).astype(np.int8)

    def is_land(self, u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Whether there is land at world coordinates `u`, `v` (float64[n], see `elevation`)."""
        return self.elevation(u, v) > 0


def _amplitude(octave: int) -> float:
    return 1.6 * 0.55 ** (octave - 2)
