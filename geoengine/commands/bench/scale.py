"""`geoengine bench scale`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from geoengine.commands.bench.options import DEFAULT_OUT, AgainOption, BundleOption, JsonOption, OutOption
from geoengine.commands.bench.running import run


class Part(StrEnum):
    """What grows."""

    photos = "photos"
    k = "k"
    rows = "rows"


_Parts = Annotated[
    list[Part] | None, typer.Argument(metavar="[photos|k|rows]…", help="What grows; all by default.")
]
_Seconds = Annotated[
    float, typer.Option(help="Time for each series of one bundle: larger rows are left out.", min=1)
]


def scale(
    parts: _Parts = None,
    bundle: BundleOption = None,
    seconds: _Seconds = 230.0,
    out: OutOption = DEFAULT_OUT,
    again: AgainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how cost grows with photos in a call, with the beam width, and with an index's rows."""
    from geoengine.bench.suite import scale as suite

    wanted = tuple(part for part in suite.PARTS if not parts or Part(part) in parts)
    settings = suite.ScaleSettings(parts=wanted, bundle=bundle, seconds=seconds)
    run(suite, settings, out=out, again=again, as_json=as_json)
