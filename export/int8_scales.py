"""The arithmetic of int8: which 8-bit numbers stand for a matrix product's inputs and weights.

Inputs get one step for the whole tensor, which the integer kernels of CPUs need, and weights one per output.
One step is too coarse where a few input channels are far larger than the rest, as in CLIP. So before it each
channel is divided by a factor of its own, and the weights' row is multiplied by it (SmoothQuant, Xiao et al.,
2023); and each channel is shifted to the middle of its range, whose constant part goes into the bias (Outlier
Suppression+, Wei et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ZERO = 128
"""The 8-bit number of a shifted input of 0. It is part of the shift, so that graphs need no zero point."""

MARGIN = 1.15
"""How far beyond the ranges seen in calibration inputs are still told apart."""

LARGEST_WEIGHT = 64
"""Half of what 8 bits hold.

CPUs without instructions for 8-bit products (AVX2 only) add two of them in 16 bits. 2 * 255 * 64 still fits;
with larger weights such sums would be cut off there, and embeddings would differ between machines.
"""

_LEAST_SHARE = 0.25  # of a channel's largest value that half its range must be: values vary beyond those seen
_STRENGTHS = (0.35, 0.5, 0.65, 0.8)  # at 1 every channel fills its range, with no room for unseen values
_TINY = 1e-8


class Observed:
    """What a tensor [..., channels] was seen to hold: range and mean by channel, and some rows of it."""

    def __init__(self, rows: int = 512, seed: int = 0) -> None:
        self.low: Floats = np.empty(0, np.float32)
        self.high: Floats = np.empty(0, np.float32)
        self._sum: NDArray[np.float64] = np.zeros(0)
        self._count = 0
        self._parts: list[Floats] = []
        self._rows = rows
        self._rng = np.random.default_rng(seed)

    def add(self, values: Floats, share: float) -> None:
        """Take in values, which are `share` of all that will be added."""
        flat = values.reshape(-1, values.shape[-1])
        low, high, total = flat.min(0), flat.max(0), flat.sum(0, dtype=np.float64)
        if self._count:
            low, high = np.minimum(low, self.low), np.maximum(high, self.high)
            total += self._sum
        self.low, self.high, self._sum = low, high, total
        self._count += len(flat)
        kept = min(len(flat), max(1, round(self._rows * share)))
        self._parts.append(flat[self._rng.choice(len(flat), kept, replace=False)])

    @property
    def mean(self) -> Floats:
        """The mean by channel."""
        return (self._sum / self._count).astype(np.float32)

    @property
    def sample(self) -> Floats:
        """Some of the rows, drawn at random."""
        return np.concatenate(self._parts)


@dataclass(frozen=True, slots=True, eq=False)
class InputScale:
    """How the inputs of products become 8-bit: round((x * factor + shift) / step), cut off at 0 and 255.

    `factor` and `shift` are per channel, `step` is one number.
    """

    factor: Floats
    shift: Floats
    step: np.float32

    def rounded(self, x: Floats) -> Floats:
        """Return what the 8-bit numbers stand for, as values of x * factor + shift."""
        whole = np.rint((x * self.factor + self.shift) / self.step).clip(0, 255)
        return np.asarray(whole * self.step, np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A matrix product in 8 bits: x @ W + b becomes rounded(x) @ (weight * step) + b + bias.

    `weight` is int8[inputs, outputs]; `step` and `bias` are per output.
    """

    weight: NDArray[np.int8]
    step: Floats
    bias: Floats


def pixel_scale(channels: int) -> InputScale:
    """Return the scale that holds pixels as the graphs have them, (0 ... 255 - 128) / 64, exactly."""
    step = 1 / 64
    shift = np.full(channels, ZERO * step, np.float32)
    return InputScale(np.ones(channels, np.float32), shift, np.float32(step))


def choose_scale(inputs: Sequence[Observed], weights: Sequence[Floats], *, smooth: bool = True) -> InputScale:
    """Return the scale of inputs that several products share, so that their results change least.

    `weights[i]` is float32[inputs, outputs] of the product that was seen to read `inputs[i]`. `smooth=False`
    leaves all channels at one scale.
    """
    low = np.minimum.reduce([observed.low for observed in inputs])
    high = np.maximum.reduce([observed.high for observed in inputs])
    middle = (low + high) / 2 if smooth else np.zeros_like(low)
    largest = np.maximum(np.abs(low), np.abs(high))
    half = np.maximum(MARGIN * np.maximum(high - middle, middle - low), _LEAST_SHARE * largest)
    half = np.maximum(half, _TINY)
    if not smooth:
        return _scale(half, middle, np.ones_like(half))
    rows = np.maximum(np.maximum.reduce([np.abs(weight).max(1) for weight in weights]), _TINY)
    candidates = [_scale(half, middle, half**a / rows ** (1 - a)) for a in _STRENGTHS]
    errors = [_error(scale, inputs, weights) for scale in candidates]
    return candidates[int(np.argmin(errors))]


def quantize(scale: InputScale, weight: Floats, observed: Observed) -> Product:
    """Return the product in 8 bits; its bias undoes the shift, and what rounding changes on average."""
    rows = weight / scale.factor[:, None]
    step = np.maximum(np.abs(rows).max(0), _TINY) / LARGEST_WEIGHT
    whole = np.rint(rows / step).astype(np.int8)
    seen = scale.rounded(observed.sample).mean(0, dtype=np.float64)
    seen += (observed.mean - observed.sample.mean(0, dtype=np.float64)) * scale.factor
    bias = observed.mean.astype(np.float64) @ weight - (seen @ whole) * step
    return Product(whole, step.astype(np.float32), bias.astype(np.float32))


def _scale(half: Floats, middle: Floats, divisor: Floats) -> InputScale:
    """Return the scale for channels that reach from middle - half to middle + half."""
    divisor = divisor / np.exp(np.log(divisor).mean())  # around 1, so that the weights stay at their size
    step = (half / divisor).max() / (ZERO - 1)
    shift = ZERO * step - middle / divisor
    return InputScale((1 / divisor).astype(np.float32), shift.astype(np.float32), np.float32(step))


def _error(scale: InputScale, inputs: Sequence[Observed], weights: Sequence[Floats]) -> float:
    """Return the part of the results' variance that is wrong in 8 bits, summed over the products."""
    total = 0.0
    for observed, weight in zip(inputs, weights, strict=True):
        x = observed.sample
        product = quantize(scale, weight, observed)
        exact = x @ weight
        found = scale.rounded(x) @ (product.weight * product.step) + product.bias
        total += float((found - exact).var() / max(float(exact.var()), _TINY))
    return total
