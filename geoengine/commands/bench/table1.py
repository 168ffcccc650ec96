"""`geoengine bench table1`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geoengine.commands.bench.options import DEFAULT_OUT, AgainOption, BundleOption, OutOption
from geoengine.commands.options import BackendOption, PrecisionOption, TilesOption
from geoengine.commands.orders import beam_widths
from geoengine.commands.terminal import Exit, complain, progress_bar, write_result

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

_Json = Annotated[bool, typer.Option("--json", help="The results as a JSON object instead of tables.")]


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
    as_json: _Json = False,
) -> None:
    """Time one photo for each beam width, as the paper's Table 1 does, beside the paper's own procedure.

    With nothing known of the tiles, with zooms 4, 6 and 8 in an index, and with all tiles known. Tiles are
    the suite's own, on the disk, unless --tiles or --simulate-network says otherwise.
    """
    import json
    from dataclasses import asdict

    from geoengine.bench.suite.results import Results
    from geoengine.bench.suite.table1 import Table1Settings, measure, tables

    settings = Table1Settings(
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
    results = Results.start(out, settings.benchmark, asdict(settings), again=again)
    try:
        with progress_bar("looking for the encoders") as show:
            measure(settings, results, show)
    except KeyboardInterrupt:
        complain(f"interrupted: {results.path} has the finished rows, and the same command goes on there")
        raise typer.Exit(Exit.INTERRUPTED) from None
    results.finish()
    complain(f"results: {results.path}")
    write_result(json.dumps(results.document, indent=1) + "\n" if as_json else tables(results.document))
