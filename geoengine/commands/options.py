"""Command line options that several commands take: one text for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geoengine.engine.scoring.kinds import Method, Score

LevelsOption = Annotated[
    str | None,
    typer.Option(help="Zooms to search, such as 4,6,8 or 4-16 (every second one). Default: all."),
]
WithinOption = Annotated[
    str | None,
    typer.Option(
        help="Search only here: west,south,east,north in degrees, a GeoJSON file, or an ISO country code."
    ),
]
BundleOption = Annotated[
    str | None,
    typer.Option(help="Engine bundle folder, or planet. Default: engines/, then the data folder."),
]
TilesOption = Annotated[
    str | None,
    typer.Option(
        help="Map tiles: a URL template with {z} {x} {y}, an .mbtiles or .pmtiles file, a folder, planet, "
        "a preset, or a .toml description of a server."
    ),
]
IndexOption = Annotated[
    Path | None,
    typer.Option(help="Tile index: levels in it are scored whole. See geoengine index.", metavar="DIR"),
]
DeadlineOption = Annotated[
    float | None,
    typer.Option(help="Seconds after which a level is scored with the tiles that have arrived."),
]
PrecisionOption = Annotated[
    str | None, typer.Option(help="fp32, fp16 or int8. Default: the bundle's fastest for the backend.")
]
BackendOption = Annotated[
    str,
    typer.Option(help="tensorrt, onnxruntime-cuda, openvino, onnxruntime-cpu; auto: the first to run."),
]
KOption = Annotated[int, typer.Option("--k", help="Beam width: tiles kept after each level.")]
MethodOption = Annotated[
    Method,
    typer.Option(
        help="tiles: search map tiles. geoclip: GeoCLIP alone, without tiles. joined: GeoCLIP's best tile "
        "joins every beam. fused: GeoCLIP's probabilities enter the path score."
    ),
]
ScoreOption = Annotated[
    Score | None,
    typer.Option(
        help="What ranks tiles. paper: the level's cosine. path: log-probabilities added along the path. "
        "Default: path where the bundle is calibrated."
    ),
]
QuotaOption = Annotated[
    int | None, typer.Option(help="Most children of one tile in a beam, while there are others.")
]
CentredOption = Annotated[
    bool, typer.Option("--centred/--no-centred", help="Subtract the mean embedding of a level's tiles.")
]
ObjectiveOption = Annotated[
    str,
    typer.Option(
        help="best-tile, or a radius such as 25km: the answer is the centre of most probability within it."
    ),
]
PriorOption = Annotated[
    str | None,
    typer.Option(
        help="How likely photos are taken anywhere: population, or a file of geoengine prior. It favours "
        "places that are much photographed. Default: everywhere alike.",
        metavar="NAME|FILE",
    ),
]
OverzoomOption = Annotated[
    bool, typer.Option("--overzoom", help="Enlarge coarser tiles where the source has none.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Encoder threads. Default: all cores.")]
MegapixelsOption = Annotated[float, typer.Option(help="Larger photos are refused before decoding.")]

OutOption = Annotated[
    Path | None,
    typer.Option(
        help="Write results to a .jsonl, .csv or .parquet (GeoParquet) file, or as parts to a folder; "
        "the same command goes on after an interruption.",
        metavar="PATH",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="With a folder as --out: jsonl, csv or parquet. Default: jsonl."),
]
PartOption = Annotated[
    int, typer.Option(help="With --out: photos in a part, of which an interruption costs at most one.")
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="With --out: delete what is there and begin anew.")
]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="With --out: try again the photos that could not be read.")
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Work on a Ray cluster: HOST:PORT of its head node, auto for the one on this machine, or local "
        "to start one here. Needs storage that all machines share.",
        metavar="ADDRESS",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(help="With --ray: workers, with --threads cores each. Default: one for each GPU, or core."),
]
