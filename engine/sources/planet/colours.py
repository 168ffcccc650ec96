"""Colour circles: each turns a hue into a colour that looks natural on one kind of thing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geoengine.engine.sources.planet.noise import Float32Array

Rgb = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class ColourCircle:
    """An ellipse in RGB space: `centre + along * cos(hue) + across * sin(hue)`, components in [0, 1]."""

    centre: Rgb
    along: Rgb
    across: Rgb

    def rgb(self, hue: Float32Array | float) -> Float32Array:
        """Colours of hues in turns, any shape `[...]`, as float32 `[..., 3]` in [0, 255]."""
        angle = np.asarray(hue, dtype=np.float32)[..., None] * np.float32(2 * math.pi)
        mixed = (
            np.asarray(self.centre)
            + np.cos(angle) * np.asarray(self.along)
            + np.sin(angle) * np.asarray(self.across)
        )
        return np.asarray(np.clip(mixed * 255, 0, 255), dtype=np.float32)


def _wheel(lightness: float, radius: float) -> ColourCircle:
    """Make the whole hue circle at one lightness: red, green and blue 120 degrees apart."""
    third = math.sqrt(3) / 2
    return ColourCircle(
        (lightness,) * 3,
        (radius, -radius / 2, -radius / 2),
        (0.0, radius * third, -radius * third),
    )


# Maps print everything in one legend, at all zooms.
MAP_BRIGHT = _wheel(0.66, 0.27)
MAP_DARK = _wheel(0.44, 0.25)
MAP_SYMBOL = _wheel(0.58, 0.36)

# Painted things on the ground can have any colour.
FLAG = _wheel(0.55, 0.38)
PANEL = _wheel(0.60, 0.32)
FRAME = _wheel(0.48, 0.30)
BODY = _wheel(0.56, 0.28)
ROOF_BAND = _wheel(0.66, 0.22)
AWNING = _wheel(0.54, 0.32)
SHOP_WALL = _wheel(0.68, 0.18)
# Nature and masonry keep to their own corner of the colour space.
HOUSE_WALL = ColourCircle((0.76, 0.70, 0.62), (0.16, -0.05, -0.12), (-0.06, 0.06, -0.16))
HOUSE_ROOF = ColourCircle((0.46, 0.36, 0.33), (0.17, -0.03, -0.08), (-0.05, 0.07, 0.15))
FOLIAGE = ColourCircle((0.42, 0.46, 0.22), (0.22, -0.08, -0.06), (-0.07, 0.09, 0.15))
SOIL = ColourCircle((0.60, 0.55, 0.42), (0.17, -0.03, -0.06), (-0.07, 0.09, -0.15))
MOUNTAIN = ColourCircle((0.52, 0.52, 0.58), (0.13, -0.02, -0.11), (-0.08, 0.09, -0.07))
HILL = ColourCircle((0.48, 0.50, 0.36), (0.16, -0.03, -0.07), (-0.07, 0.08, 0.15))
CROP_BRIGHT = ColourCircle((0.66, 0.60, 0.36), (0.19, -0.10, -0.02), (-0.12, 0.09, 0.19))
CROP_DARK = ColourCircle((0.44, 0.38, 0.24), (0.19, -0.09, -0.03), (-0.10, 0.10, 0.15))
