"""`geoengine prior`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geoengine.commands.terminal import complain, progress_bar
from geoengine.engine.errors import GeoEngineError


def prior(
    data_set: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="Photos with places: a .csv, .tsv or .parquet table, a folder with one, or .tar files.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The prior, for --prior.", metavar="FILE.npz")],
    zoom: Annotated[int, typer.Option(help="Zoom of the tiles that photos are counted in.")] = 8,
) -> None:
    """Count where photos were taken, as a prior for geoengine locate --prior FILE.

    The prior says how likely photos like these are to be taken anywhere, and nothing of the photo at hand. It
    moves answers to where these photos are: with photos from the web, to Europe and North America.
    """
    import numpy as np

    from geoengine.engine.photo_sets import open_photo_set
    from geoengine.engine.render.files import check_writable
    from geoengine.engine.scoring.density import MOST_ZOOM, Density, counted

    if not 0 <= zoom <= MOST_ZOOM:
        raise GeoEngineError(f"photos are counted in tiles of zoom 0 to {MOST_ZOOM}, got {zoom}")
    check_writable(out)
    places = []
    with progress_bar("reading the places") as show:
        for entry in open_photo_set(data_set, need_place=True):
            assert entry.place is not None, "asked for"
            places.append(entry.place)
            if len(places) % 1000 == 0:
                show("places read", len(places), None)
    if not places:
        raise GeoEngineError(f"{data_set} has no photos to count")
    ids, counts = counted(np.array(places), np.ones(len(places)), zoom)
    name = Path(data_set).stem
    Density(name=name, world="earth", zoom=zoom, ids=ids, counts=counts).write(out)
    complain(f"wrote {out}: {len(places)} photos in {len(ids)} tiles")
