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
    list[Part] | None,
    typer.Argument(metavar="PART", help="What grows. Default: all; results of some are a file apart."),
]
_Seconds = Annotated[
    float, typer.Option(help="Time for each series of one bundle; what would not fit is left out.", min=1)
]


def scale(
    parts: _Parts = None,
    bundle: BundleOption = None,
    seconds: _Seconds = 230.0,
    out: OutOption = DEFAULT_OUT,
    again: AgainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how cost grows with photos, beam width and index.

    With the photos of one call, with k, and with the rows of an index. Tables go to stdout, and the results
    with plots to the folder of results.
    """
    from geoengine.bench.suite import scale as suite

    wanted = tuple(part for part in suite.PARTS if not parts or Part(part) in parts)
    settings = suite.ScaleSettings(parts=wanted, bundle=bundle, seconds=seconds)
    run(suite, settings, out=out, again=again, as_json=as_json)
