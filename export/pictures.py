"""Structured test pictures: what distinguishes a right resize and a right encoder from nearly right ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def sample_pictures(side: int, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return uint8[count, side, side, 3]: noise, gradients, stripes and shapes in turn, at several scales.

    The same arguments always give the same pictures.
    """
    rng = np.random.default_rng([seed, side])
    kinds = (_noise, _gradient, _stripes, _shapes)
    pictures = [kinds[number % len(kinds)](side, rng) for number in range(count)]
    return np.stack(pictures).clip(0, 255).astype(np.uint8)


def _noise(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw coloured noise of a random coarseness, from single pixels to a quarter of the side."""
    cell = int(rng.choice([1, 2, max(side // 16, 1), max(side // 4, 1)]))
    cells = rng.uniform(0, 255, (-(-side // cell), -(-side // cell), 3))
    return np.repeat(np.repeat(cells, cell, 0), cell, 1)[:side, :side]


def _gradient(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a ramp between two colours in a random direction."""
    along = _plane(side, rng.uniform(0, 2 * np.pi))
    share = (along - along.min()) / max(np.ptp(along), 1e-9)
    first, second = rng.uniform(0, 255, (2, 3))
    return np.asarray(share[..., None] * second + (1 - share[..., None]) * first)


def _stripes(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw sharp stripes of two colours, 1.5 to side / 4 pixels wide."""
    width = rng.uniform(1.5, max(side / 4, 2.0))
    odd = (np.floor(_plane(side, rng.uniform(0, np.pi)) / width) % 2)[..., None]
    first, second = rng.uniform(0, 255, (2, 3))
    return np.asarray(odd * second + (1 - odd) * first)


def _shapes(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw discs and boxes of many sizes on a gradient, with a little noise."""
    picture = _gradient(side, rng) + rng.normal(0, 6, (side, side, 3))
    y, x = np.mgrid[:side, :side]
    for _ in range(12):
        cx, cy = rng.uniform(0, side, 2)
        radius = side * 10 ** rng.uniform(-1.7, -0.6)
        if rng.random() < 0.5:
            inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        else:
            inside = (abs(x - cx) < radius) & (abs(y - cy) < radius * rng.uniform(0.2, 1.0))
        picture[inside] = rng.uniform(0, 255, 3)
    return picture


def _plane(side: int, angle: float) -> NDArray[np.float64]:
    y, x = np.mgrid[:side, :side]
    return np.asarray(x * np.cos(angle) + y * np.sin(angle))
