"""`geoengine bench table1`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geoengine.commands.bench.options import DEFAULT_OUT, AgainOption, BundleOption, JsonOption, OutOption
from geoengine.commands.bench.running import run
from geoengine.commands.options import BackendOption, PrecisionOption, TilesOption
from geoengine.commands.orders import beam_widths

_MoreK = Annotated[
    list[int] | None,
    typer.Argument(metavar="K", show_default=False, help="More beam widths, as in --k 16 32 64."),
]
_Ks = Annotated[
    list[str], typer.Option("--k", help="Beam widths: 16,32,64, or the option several times.", metavar="K,…")
]
_Photos = Annotated[
    Path | None,
    typer.Option(help="Folder of photos, perhaps with a table of their places. Default: drawn ones."),
]
_Count = Annotated[
    int | None,
    typer.Option(help="Photos located at each k. Default: 3 at k=16 and fewer above; 25 on a GPU."),
]
_Network = Annotated[
    float | None,
    typer.Option(
        "--simulate-network",
        help="Fetch tiles from a server here that answers after so many ms.",
        metavar="MS",
    ),
]
_Budget = Annotated[
    float, typer.Option(help="Seconds at each k for the paper's procedure in PyTorch, in turn with ours.")
]


def table1(
    more_k: _MoreK = None,
    k: _Ks = ["16,32,64"],  # noqa: B006
    bundle: BundleOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    photos: _Photos = None,
    count: _Count = None,
    tiles: TilesOption = None,
    simulate_network: _Network = None,
    budget: _Budget = 20.0,
    out: OutOption = DEFAULT_OUT,
    again: AgainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time a photo by beam width, beside the paper's procedure.

    As the paper's Table 1 does: with nothing known of the tiles, with zooms 4, 6 and 8 in an index, and with
    all tiles known. Tiles are the suite's own, on the disk, unless --tiles or --simulate-network says
    otherwise.
    """
    from geoengine.bench.suite import table1 as suite

    settings = suite.Table1Settings(
        ks=tuple(beam_widths(k, more_k)),
        bundle=bundle,
        backend=backend,
        precision=precision,
        photos=None if photos is None else str(photos),
        count=count,
        tiles=tiles,
        network_ms=simulate_network,
        budget_s=budget,
    )
    run(suite, settings, out=out, again=again, as_json=as_json)
