"""The parts of `geoengine bench peers`, in a module that loads nothing: the command's help needs them."""

from __future__ import annotations

from enum import StrEnum


class Part(StrEnum):
    """What is compared."""

    encoders = "encoders"
    scoring = "scoring"
    both = "both"
