"""What the sources share that are one file, with tiles and their description in it."""

import html
import re
from collections.abc import Iterable

from geoengine.engine.errors import SourceError
from geoengine.engine.sources.decode import decode_tile

TRIED = 8
"""Tiles looked at to find the side of an archive's tiles."""


def vector_tiles(file: str) -> SourceError:
    """Return the error for an archive of vector tiles."""
    return SourceError(f"{file}: this file holds vector tiles, but pictures are needed")


def side_of(file: str, tiles: Iterable[object]) -> int:
    """Return the side in pixels of the first picture among an archive's first tiles, which are bytes.

    Raises SourceError when there are no tiles or none is a picture.
    """
    pictures = [decode_tile(data) for data in tiles]
    sides = [picture.shape[1] for picture in pictures if picture is not None]
    if not sides:
        what = "no tiles" if not pictures else "tiles that are not PNG, JPEG or WebP pictures"
        raise SourceError(f"{file}: this file holds {what}")
    return int(sides[0])


def plain_text(text: str) -> str:
    """Return a name or attribution, which in archives is often HTML, without its tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split())
