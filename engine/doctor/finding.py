"""One thing that `geoengine doctor` looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

REINSTALL = "pip install --force-reinstall --no-deps . (in the source folder of geoengine)"


class State(StrEnum):
    """How a finding is: fine, not there but not needed, or broken."""

    OK = "ok"
    ABSENT = "absent"
    BROKEN = "broken"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at; `remedy` is the command that mends it, "" when nothing needs mending."""

    topic: str
    state: State
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-ready values."""
        return asdict(self)


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
