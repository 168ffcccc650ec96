"""Ground-level photos of the planet: scenes whose things take their colours from the place at every scale.

From far to near: mountains and hills show level 6, trees and soil 4, a flag 2, the field 10, the house 12,
the shop 14, the van 8 and the sign 16. Light, weather, positions, sizes, texture and blur are chance, and
some photos lack one of the things.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from geoengine.engine.sources.planet import colours
from geoengine.engine.sources.planet.colours import ColourCircle
from geoengine.engine.sources.planet.names import place_names
from geoengine.engine.sources.planet.world import ATTRIBUTE_LEVELS, World

UInt8Array = npt.NDArray[np.uint8]
Colour = list[float]
Points = list[tuple[float, float]]

MISSING_SHARE = 0.35  # of the photos lack one of the things below
_LEVEL_OF = {"flag": 2, "trees": 4, "van": 8, "crops": 10, "house": 12, "shop": 14, "sign": 16}
_GLASS: Colour = [58, 68, 82]
_DARK: Colour = [52, 48, 46]


@dataclass(slots=True)
class _Canvas:
    """A picture with the unit square in its middle, which is what a centre crop keeps; y grows downwards."""

    pixels: UInt8Array
    rng: np.random.Generator

    @property
    def side(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def left(self) -> float:
        """Left border in units of the square; the right one is at `1 - left`."""
        return float(1 - self.pixels.shape[1] / self.side) / 2

    def polygon(self, points: Points, colour: Colour) -> None:
        fixed = np.round((np.array(points) - (self.left, 0)) * self.side * 16 - 8).astype(np.int32)
        cv2.fillPoly(self.pixels, [fixed], colour, cv2.LINE_AA, 4)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def disc(self, x: float, y: float, radius: tuple[float, float], colour: Colour) -> None:
        centre = (round((x - self.left) * self.side * 16), round(y * self.side * 16))
        axes = (round(radius[0] * self.side * 16), round(radius[1] * self.side * 16))
        cv2.ellipse(self.pixels, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA, 4)

    def text(self, x: float, y: float, height: float, text: str, colour: Colour) -> None:
        scale = height * self.side / 22
        if scale >= 0.2:
            point = (round((x - self.left) * self.side), round(y * self.side))
            cv2.putText(self.pixels, text, point, cv2.FONT_HERSHEY_DUPLEX, scale, colour, 1, cv2.LINE_AA)

    def jitter(self, amount: float) -> float:
        return float(self.rng.uniform(-amount, amount))


def render_photo(world: World, x: int, y: int, seed: int, height: int = 480) -> tuple[UInt8Array, str | None]:
    """Photograph the level-16 cell (x, y).

    Returns RGB uint8[height, height * 4 / 3, 3] and the name of the thing that the photo lacks, if any. Equal
    arguments give equal pixels.
    """
    rng = np.random.default_rng([world.seed, x, y, seed])
    missing = str(rng.choice(list(_LEVEL_OF))) if rng.random() < MISSING_SHARE else None
    hues = world.ancestor_hues(16, np.array([[x, y]]))[0]
    hue = dict(zip(ATTRIBUTE_LEVELS, hues.tolist(), strict=True))
    canvas = _Canvas(np.empty((height, height * 4 // 3, 3), dtype=np.uint8), rng)
    horizon = 0.46 + canvas.jitter(0.025)
    _sky(canvas)
    _relief(canvas, horizon, hue[6])
    _ground(canvas, horizon, hue[4])
    shop, sign = (place_names(world.seed, up, np.array([[x, y]]) >> (16 - up))[0] for up in (14, 16))
    draw: dict[str, Callable[[], None]] = {
        "trees": lambda: _trees(canvas, horizon, hue[4]),
        "crops": lambda: _crops(canvas, horizon, hue[10]),
        "house": lambda: _house(canvas, horizon, hue[12]),
        "shop": lambda: _shop(canvas, horizon, hue[14], shop),
        "flag": lambda: _flag(canvas, hue[2]),
        "sign": lambda: _sign(canvas, hue[16], sign),
        "van": lambda: _van(canvas, hue[8]),
    }
    for thing, draw_thing in draw.items():
        if thing != missing:
            draw_thing()
    return _develop(canvas.pixels, rng), missing


def unseen_hues(missing: str | None) -> list[tuple[int, int]]:
    """Return the (level, 0 for `a` or 1 for `b`) of each hue that a photo lacking a thing does not show."""
    if missing is None:
        return []
    hues = (0,) if missing == "trees" else (0, 1)  # the soil still shows `b`
    return [(_LEVEL_OF[missing], hue) for hue in hues]


def _pair(first: ColourCircle, second: ColourCircle, hues: list[float]) -> tuple[Colour, Colour]:
    return first.rgb(hues[0]).tolist(), second.rgb(hues[1]).tolist()


def _shade(colour: Colour, factor: float) -> Colour:
    return [component * factor for component in colour]


def _sky(canvas: _Canvas) -> None:
    height = canvas.pixels.shape[0]
    grey = canvas.rng.uniform(0, 0.7)
    high = np.array([96, 148, 212]) * (1 - grey) + np.array([158, 166, 178]) * grey
    low = np.array([200, 218, 236]) * (1 - grey) + np.array([206, 208, 212]) * grey
    ramp = np.clip(np.linspace(0, 2, height), 0, 1)[:, None, None]
    canvas.pixels[:] = (high * (1 - ramp) + low * ramp).astype(np.uint8)
    for _ in range(int(canvas.rng.integers(2, 7))):
        x, y = canvas.rng.uniform(canvas.left, 1 - canvas.left), canvas.rng.uniform(0.02, 0.36)
        for _ in range(4):
            radius = (canvas.rng.uniform(0.04, 0.10), canvas.rng.uniform(0.012, 0.03))
            canvas.disc(x + canvas.jitter(0.08), y + canvas.jitter(0.015), radius, [232, 235, 240])


def _ridge(canvas: _Canvas, base: float, height: float, colour: Colour, points: int) -> None:
    x = np.linspace(canvas.left - 0.05, 1.05 - canvas.left, points)
    y = base - height * canvas.rng.uniform(0.45, 1.0, points)
    canvas.polygon(
        [*zip(x.tolist(), y.tolist(), strict=True), (1.1 - canvas.left, 0.7), (canvas.left - 0.1, 0.7)],
        colour,
    )


def _relief(canvas: _Canvas, horizon: float, hues: list[float]) -> None:
    mountain, hill = _pair(colours.MOUNTAIN, colours.HILL, hues)
    _ridge(canvas, horizon - 0.035, 0.17, mountain, 9)
    _ridge(canvas, horizon + 0.01, 0.075, hill, 14)


def _ground(canvas: _Canvas, horizon: float, hues: list[float]) -> None:
    soil = colours.SOIL.rgb(hues[1]).tolist()
    canvas.box(canvas.left - 0.1, horizon, 1.1 - canvas.left, 1.1, soil)
    vanish = 0.5 + canvas.jitter(0.03)
    asphalt: Colour = [112 + canvas.jitter(10)] * 3
    canvas.polygon([(vanish - 0.012, horizon), (vanish + 0.012, horizon), (0.86, 1.1), (0.32, 1.1)], asphalt)
    for near in (0.15, 0.4, 0.75):
        y0, y1 = horizon + (1.1 - horizon) * near, horizon + (1.1 - horizon) * (near + 0.12)
        x0, x1 = vanish + (0.59 - vanish) * near, vanish + (0.59 - vanish) * (near + 0.12)
        canvas.polygon(
            [
                (x0 - 0.012 * near, y0),
                (x0 + 0.012 * near, y0),
                (x1 + 0.014 * near, y1),
                (x1 - 0.014 * near, y1),
            ],
            [222, 220, 210],
        )


def _trees(canvas: _Canvas, horizon: float, hues: list[float]) -> None:
    foliage = colours.FOLIAGE.rgb(hues[0]).tolist()
    shape = int(hues[0] * 4) % 4
    for x in (0.37, 0.465, 0.56, 0.645):
        x, base, size = (
            x + canvas.jitter(0.025),
            horizon + 0.055 + canvas.jitter(0.015),
            0.075 * (1 + canvas.jitter(0.15)),
        )
        canvas.box(x - 0.007, base - size, x + 0.007, base, [86, 66, 50])
        dark, light = _shade(foliage, 0.82), _shade(foliage, 1.06)
        if shape == 0:
            canvas.disc(x, base - 1.25 * size, (0.62 * size, 0.75 * size), dark)
            canvas.disc(x - 0.012, base - 1.35 * size, (0.44 * size, 0.52 * size), light)
        elif shape == 1:
            canvas.polygon(
                [
                    (x - 0.6 * size, base - 0.4 * size),
                    (x, base - 2.1 * size),
                    (x + 0.6 * size, base - 0.4 * size),
                ],
                dark,
            )
            canvas.polygon(
                [
                    (x - 0.6 * size, base - 0.4 * size),
                    (x, base - 2.1 * size),
                    (x + 0.15 * size, base - 0.4 * size),
                ],
                light,
            )
        elif shape == 2:
            canvas.disc(x, base - 1.25 * size, (0.42 * size, 1.0 * size), dark)
            canvas.disc(x - 0.008, base - 1.3 * size, (0.28 * size, 0.8 * size), light)
        else:
            for turn in (-0.5, 0.0, 0.5):
                canvas.disc(
                    x + turn * size,
                    base - (1.35 - abs(turn)) * size,
                    (0.45 * size, 0.45 * size),
                    light if turn < 0 else dark,
                )


def _crops(canvas: _Canvas, horizon: float, hues: list[float]) -> None:
    bright, dark = _pair(colours.CROP_BRIGHT, colours.CROP_DARK, hues)
    top, far = horizon + 0.24 + canvas.jitter(0.02), 0.30 + canvas.jitter(0.02)
    stripes = 8
    for i in range(stripes):
        x0, x1 = (-0.30 + (far + 0.30) * t / stripes for t in (i, i + 1))
        b0, b1 = (-0.75 + 1.05 * t / stripes for t in (i, i + 1))
        canvas.polygon([(x0, top), (x1, top), (b1, 1.1), (b0, 1.1)], bright if i % 2 else dark)


def _house(canvas: _Canvas, horizon: float, hues: list[float]) -> None:
    wall, roof = _pair(colours.HOUSE_WALL, colours.HOUSE_ROOF, hues)
    x, base, size = (
        0.05 + canvas.jitter(0.025),
        horizon + 0.20 + canvas.jitter(0.015),
        0.26 * (1 + canvas.jitter(0.08)),
    )
    high = base - 0.60 * size
    canvas.box(x, high, x + size, base, wall)
    canvas.polygon(
        [
            (x - 0.02, high),
            (x + 0.16 * size, high - 0.5 * size),
            (x + 0.84 * size, high - 0.5 * size),
            (x + size + 0.02, high),
        ],
        roof,
    )
    canvas.box(x + 0.44 * size, base - 0.3 * size, x + 0.56 * size, base, _DARK)
    for left in (0.12, 0.72):
        canvas.box(x + left * size, high + 0.15 * size, x + (left + 0.16) * size, high + 0.3 * size, _GLASS)


def _shop(canvas: _Canvas, horizon: float, hues: list[float], name: str) -> None:
    wall, awning = _pair(colours.SHOP_WALL, colours.AWNING, hues)
    x, base, size = (
        0.69 + canvas.jitter(0.025),
        horizon + 0.23 + canvas.jitter(0.015),
        0.26 * (1 + canvas.jitter(0.08)),
    )
    canvas.box(x, base - 0.85 * size, x + size, base, wall)
    canvas.text(x + 0.1 * size, base - 0.70 * size, 0.026, name, _DARK)
    canvas.polygon(
        [
            (x, base - 0.62 * size),
            (x + size, base - 0.62 * size),
            (x + size + 0.025, base - 0.34 * size),
            (x - 0.025, base - 0.34 * size),
        ],
        awning,
    )
    canvas.box(x + 0.08 * size, base - 0.3 * size, x + 0.55 * size, base - 0.08 * size, _GLASS)
    canvas.box(x + 0.68 * size, base - 0.3 * size, x + 0.86 * size, base, _DARK)


def _flag(canvas: _Canvas, hues: list[float]) -> None:
    top, bottom = _pair(colours.FLAG, colours.FLAG, hues)
    x, y, size = 0.08 + canvas.jitter(0.025), 0.045 + canvas.jitter(0.02), 0.23 * (1 + canvas.jitter(0.1))
    canvas.box(x - 0.008, y - 0.01, x + 0.002, 0.66, [92, 92, 98])
    sag, half = canvas.jitter(0.025), 0.36 * size
    for start, colour in ((0.0, top), (half, bottom)):
        canvas.polygon(
            [
                (x, y + start),
                (x + size, y + start + sag),
                (x + size, y + start + half + sag),
                (x, y + start + half),
            ],
            colour,
        )


def _sign(canvas: _Canvas, hues: list[float], name: str) -> None:
    panel, frame = _pair(colours.PANEL, colours.FRAME, hues)
    x, y, size = 0.66 + canvas.jitter(0.025), 0.04 + canvas.jitter(0.02), 0.28 * (1 + canvas.jitter(0.08))
    canvas.box(x + 0.03 * size, y, x + 0.09 * size, 0.66, [98, 96, 94])
    canvas.box(x, y, x + size, y + 0.78 * size, frame)
    canvas.box(x + 0.16 * size, y + 0.16 * size, x + 0.84 * size, y + 0.62 * size, panel)
    canvas.text(x + 0.2 * size, y + 0.43 * size, 0.03, name, [250, 250, 250])


def _van(canvas: _Canvas, hues: list[float]) -> None:
    body, band = _pair(colours.BODY, colours.ROOF_BAND, hues)
    x, base, size = 0.50 + canvas.jitter(0.03), 0.93 + canvas.jitter(0.02), 0.34 * (1 + canvas.jitter(0.08))
    canvas.box(x + 0.05 * size, base - 0.58 * size, x + 0.95 * size, base - 0.3 * size, band)
    canvas.box(x, base - 0.32 * size, x + size, base - 0.04 * size, body)
    for left in (0.12, 0.40, 0.68):
        canvas.box(x + left * size, base - 0.46 * size, x + (left + 0.2) * size, base - 0.34 * size, _GLASS)
    for wheel in (0.22, 0.78):
        canvas.disc(x + wheel * size, base - 0.04 * size, (0.09 * size, 0.09 * size), [34, 34, 36])


def _develop(pixels: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    """Exposure, white balance, saturation, sensor noise and, in three of ten photos, blur."""
    gain = rng.uniform(0.78, 1.1) * (1 + rng.uniform(-0.06, 0.06, 3))
    saturation = rng.uniform(0.75, 1.0)
    mix = (saturation * np.eye(3) + (1 - saturation) / 3) * gain[:, None]
    picture = cv2.transform(pixels, mix.astype(np.float32))
    if rng.random() < 0.3:
        sigma = rng.uniform(0.6, 1.6) * pixels.shape[0] / 480
        picture = cv2.GaussianBlur(picture, (0, 0), sigma)
    noise = np.empty(pixels.shape, dtype=np.int16)
    cv2.setRNGSeed(int(rng.integers(1 << 30)))
    cv2.randn(noise, np.zeros(3), np.full(3, 6.0))
    return np.asarray(cv2.add(picture, noise, dtype=cv2.CV_8U), dtype=np.uint8)
