"""Place names: a hashed word for each cell, the same on maps and on signs."""

from __future__ import annotations

from geoengine.engine.sources.planet.noise import Int64Array, hash_integers

_ONSETS = ("k", "m", "t", "l", "v", "d", "s", "r", "g", "b", "n", "p", "h", "tr", "sh", "br")
_VOWELS = ("a", "e", "i", "o", "u", "a", "o", "ia")
_CODAS = ("", "", "n", "r", "l", "s", "", "rd", "m", "st")
_KEY_NAME = 11


def place_names(seed: int, level: int, xy: Int64Array) -> list[str]:
    """Return the names of the cells `xy`, int64[n, 2]: two or three syllables, capitalised."""
    return [_word(bits) for bits in hash_integers(seed, _KEY_NAME, level, xy[:, 0], xy[:, 1]).tolist()]


def _word(bits: int) -> str:
    syllables = 2 + bits % 2
    bits >>= 3
    word = ""
    for _ in range(syllables):
        word += _ONSETS[bits % 16] + _VOWELS[(bits >> 4) % 8]
        bits >>= 7
    return (word + _CODAS[bits % 10]).capitalize()
