"""Place names: a hashed word for each cell, the same on maps and on signs."""

from __future__ import annotations

from geoengine.engine.sources.planet.noise import hash_integers

_ONSETS = ("k", "m", "t", "l", "v", "d", "s", "r", "g", "b", "n", "p", "h", "tr", "sh", "br")
_VOWELS = ("a", "e", "i", "o", "u", "a", "o", "ia")
_CODAS = ("", "", "n", "r", "l", "s", "", "rd", "m", "st")
_KEY_NAME = 11


def place_name(seed: int, level: int, x: int, y: int) -> str:
    """Name of a cell, one to three syllables, capitalised."""
    bits = int(hash_integers(seed, _KEY_NAME, level, x, y)[0])
    syllables = 2 + bits % 2
    bits >>= 3
    word = ""
    for _ in range(syllables):
        word += _ONSETS[bits % 16] + _VOWELS[(bits >> 4) % 8]
        bits >>= 7
    return (word + _CODAS[bits % 10]).capitalize()
