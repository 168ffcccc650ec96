"""The parts of `geoengine bench peers`, in a module that loads nothing: the command's help needs them."""

from __future__ import annotations

from enum import StrEnum


class Part(StrEnum):
    """What is compared."""

    encoders = "encoders"
    scoring = "scoring"
    both = "both"

    @property
    def benchmark(self) -> str:
        """The name of its results: a part alone must not replace both."""
        return "peers" if self is Part.both else f"peers-{self}"
