"""How the command line writes levels."""

from __future__ import annotations

from geoengine.engine.errors import GeoEngineError

_DEEPEST = 30


def parse_levels(text: str) -> tuple[int, ...]:
    """Return the zooms of "4,6,8", "4-16" (every second one) or a mixture; raises GeoEngineError."""
    zooms: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            start, end = int(first), int(last if dash else first)
        except ValueError:
            raise GeoEngineError(f"levels are zooms such as 4,6,8 or 4-16, got {text!r}") from None
        if end < start or (end - start) % 2:
            raise GeoEngineError(
                f"levels {part}: a range goes up in steps of two, such as 4-16; write other zooms as a list"
            )
        if end > _DEEPEST:  # before a huge range is made
            raise GeoEngineError(f"levels {part}: zoom {end} does not exist, the deepest is {_DEEPEST}")
        zooms += range(start, end + 1, 2)
    return tuple(zooms)
