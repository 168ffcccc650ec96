"""`geoengine serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geoengine.commands.options import (
    BackendOption,
    BundleOption,
    IndexOption,
    PrecisionOption,
    ThreadsOption,
    TilesOption,
)
from geoengine.commands.orders import EngineOrder
from geoengine.commands.terminal import complain, write_result
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.extras import require_extra
from geoengine.engine.scoring.kinds import Method

if TYPE_CHECKING:
    from geoengine.service.settings import Settings

_KeysFile = Annotated[
    Path | None, typer.Option("--keys", help="File with hashes of API keys; requests then need one.")
]


def serve(
    demo: Annotated[
        bool, typer.Option("--demo", help="Search the built-in demo planet, which is not Earth.")
    ] = False,
    bundle: BundleOption = None,
    tiles: TilesOption = None,
    index: IndexOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; one that others reach needs --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 for any free one.", min=0, max=65535)] = 8000,
    keys: _KeysFile = None,
    new_key: Annotated[
        str | None,
        typer.Option(help="Make a key, add its hash to --keys, print it, and end.", metavar="NAME"),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name that the service may be called by; repeatable.")
    ] = None,
    min_precision_km: Annotated[
        float | None, typer.Option(help="Tell no place more precisely than this, whoever asks.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Photos per minute and client; 0 for no limit.")] = 120.0,
    deadline: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 300.0,
    max_megabytes: Annotated[float, typer.Option(help="Larger uploads are refused.")] = 32.0,
    max_megapixels: Annotated[float, typer.Option(help="Larger photos are refused before decoding.")] = 50.0,
    searching: Annotated[
        int | None, typer.Option(help="Photos searched at once. Default: two for each core.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Photos that may wait besides.")] = 64,
    per_client: Annotated[int, typer.Option(help="Photos of one client under way.")] = 48,
    memory: Annotated[int, typer.Option(help="MB for embeddings of tiles met before.")] = 256,
) -> None:
    """Answer over HTTP where photos may have been taken, and show the search on a page.

    Photos stay in memory and are never logged. Without --keys, only this machine is answered. `--keys FILE
    --new-key NAME` makes a key. A worker that ends is replaced. Ctrl-C ends the service.

    Exit status: 0 when it was told to end; 2 it could not start, or the command line was wrong.
    """
    require_extra("serve", ("fastapi", "uvicorn", "python_multipart", "prometheus_client"), "serving")
    if new_key is not None:
        _make_key(keys, new_key)
        return
    order = EngineOrder.parse(demo, bundle, tiles, index, backend, precision, threads, Method.tiles)
    from geoengine.service.settings import Settings

    settings = Settings(
        bundle=order.bundle,
        tiles=order.tiles,
        index=None if index is None else str(index),
        backend=backend,
        precision=precision,
        threads=threads,
        host=host,
        port=port,
        keys=None if keys is None else str(keys),
        allowed_hosts=tuple(allow_host or ()),
        max_bytes=round(max_megabytes * 2**20),
        max_pixels=round(max_megapixels * 1e6),
        **({} if searching is None else {"searching": searching}),
        waiting=queue,
        per_client=per_client,
        rate_per_minute=rate,
        deadline_s=deadline,
        rows_mb=memory,
        min_precision_km=min_precision_km,
    )
    raise typer.Exit(_serve(settings))


def _make_key(file: Path | None, name: str) -> None:
    from geoengine.service.keys import new_key

    if file is None:
        raise GeoEngineError("--new-key needs --keys FILE, the file that the key's hash goes into")
    key = new_key(file, name)
    complain("this is the only time that the key is shown; send it as Authorization: Bearer KEY")
    write_result(key + "\n")


def _serve(settings: Settings) -> int:
    from geoengine.service.supervisor import supervise

    if settings.keys is None:
        complain("without --keys, only this machine is answered")
    return supervise(settings, complain)
