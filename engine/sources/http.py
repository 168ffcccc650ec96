"""Tiles from a web server, asked for with a URL template, and kept in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from geoengine.engine.errors import SourceError
from geoengine.engine.sources import TileBatch, fingerprint
from geoengine.engine.sources.cache import Kept, TileCache
from geoengine.engine.sources.decode import Picture, read_picture
from geoengine.engine.sources.description import CachePolicy, SourceDescription
from geoengine.engine.sources.fetch import MISSING, Answer, Call, Fetcher, UnusableError
from geoengine.engine.sources.keeping import keep_until
from geoengine.engine.sources.streaming import Encoded, Job, stream
from geoengine.engine.sources.template import UrlTemplate
from geoengine.engine.tiles import Tile, as_xy, bounds_array

_TILE_SIZE = 256  # until a tile tells
_LOOKED_UP = 128  # tiles looked for in the cache at a time
_TEXT_TYPES = ("text/", "application/json", "application/xml", "application/xhtml")
_VECTOR_TYPES = ("vector-tile", "protobuf")
_SAME_TEXTS = 3  # a page that comes as often in place of a tile is the server's way to say that it has none


class HttpSource:
    """A web server's tiles, fetched in threads.

    A tile for which the server answers 404, 410, 204, nothing, or one of the description's placeholders is
    missing, and the cache remembers that for a while. Answers that pass (429, 5xx, lost connections, bodies
    cut short, pages in place of pictures) are asked for again with exponential backoff and jitter, or when
    Retry-After says. A tile for which that fails too is missing, with one warning; when eight tiles in a row
    fail, or all of a request, the source is out of reach and SourceError is raised, as it is for any other
    answer. A picture that does not decode is asked for once more and then missing.

    The tiles' side is that of the description or of the first tile that arrives; before, 256 is assumed.
    Raises SourceError for a template that cannot be used.
    """

    world = "earth"

    def __init__(
        self,
        description: SourceDescription,
        cache: TileCache | None = None,
        *,
        template: UrlTemplate | None = None,
    ) -> None:
        self._description = description
        self._template = template or template_of(description)
        self._template.check_address()
        self._cache = cache
        self._fetcher = Fetcher(description, self._template)
        self.name = description.name or self._template.shown
        self.attribution = description.attribution
        self.min_zoom, self.max_zoom = description.min_zoom, description.max_zoom
        self.bounds = description.bounds
        self.identity = identity_of(description, self._template)
        self.storable = description.cache is not CachePolicy.NONE
        self.tile_size = description.tile_size or _TILE_SIZE
        self._size_known = bool(description.tile_size)
        self.has_pictures = False  # has ever sent one

    def read(self, z: int, xy: npt.NDArray[np.int64]) -> Iterator[TileBatch]:
        """Yield the tiles of the request that the server has; those it had no answer for are missing."""
        tiles = as_xy(z, xy)
        if not self.min_zoom <= z <= self.max_zoom or not len(tiles):
            return
        call = Call(self.name)
        try:
            jobs = self._jobs(z, tiles, call)
            yield from stream(jobs, workers=self._description.concurrency, tile_size=self._side)
        finally:
            call.stopped.set()
            if self._cache is not None:
                self._cache.flush()
        call.finish()

    def close(self) -> None:
        """Close the connections and the cache."""
        self._fetcher.close()
        if self._cache is not None:
            self._cache.close()

    def _jobs(self, z: int, tiles: npt.NDArray[np.int64], call: Call) -> Iterator[tuple[int, Job]]:
        box, edges = self.bounds, bounds_array(z, tiles)
        inside = (edges[:, 0] < box.east) & (edges[:, 2] > box.west)
        inside &= (edges[:, 1] < box.north) & (edges[:, 3] > box.south)
        positions = np.flatnonzero(inside)
        for start in range(0, len(positions), _LOOKED_UP):
            part = positions[start : start + _LOOKED_UP].tolist()
            addresses = [Tile(z, x, y) for x, y in tiles[part].tolist()]
            kept = self._cache.get(addresses) if self._cache is not None else {}
            for position, tile in zip(part, addresses, strict=True):
                found = kept.get(tile)
                if found is None:
                    yield position, partial(self._fetch, tile, call)
                elif found.data:
                    yield position, partial(self._from_cache, tile, found, call)

    def _side(self, picture: Picture) -> int:
        if not self._size_known:
            self.tile_size, self._size_known = picture.shape[1], True
        return self.tile_size

    def _from_cache(self, tile: Tile, kept: Kept, call: Call) -> Encoded:
        call.answered()
        return Encoded(kept.data, partial(self._fetch_again, tile, call))

    def _fetch_again(self, tile: Tile, call: Call) -> Picture | None:
        """Fetch a tile whose bytes in the cache are no picture."""
        if self._cache is not None:
            self._cache.drop(tile)
        return self._fetch(tile, call)

    def _fetch(self, tile: Tile, call: Call) -> Picture | None:
        url = self._template.url(tile)
        return self._fetcher.get(url, _TileReader(self, tile), what=f"tile {tile}", call=call)

    def keep(self, tile: Tile, answer: Answer, data: bytes) -> None:
        """Write a tile, or b"" for a missing one, into the cache, as far as the policy allows."""
        if self._cache is not None:
            until = keep_until(self._description, answer.headers, missing=not data)
            if until is not None:
                self._cache.put(tile, data, until)

    def is_placeholder(self, data: bytes) -> bool:
        """Tell whether a picture is one of those that mean that there is no imagery."""
        hashes = self._description.placeholders
        return bool(hashes) and hashlib.sha256(data).hexdigest() in hashes


class _TileReader:
    """What one tile's answers are, one after the other, until one is good."""

    def __init__(self, source: HttpSource, tile: Tile) -> None:
        self._source = source
        self._tile = tile
        self._bad: list[bytes] = []

    def __call__(self, answer: Answer) -> Picture | None:
        data = answer.body
        if answer.status in MISSING or not data or self._source.is_placeholder(data):
            self._source.keep(self._tile, answer, b"")
            return None
        if any(kind in answer.headers.get("content-type", "").lower() for kind in _VECTOR_TYPES):
            raise SourceError(f"{self._source.name}: this server sends vector tiles, but pictures are needed")
        picture = None if _is_text(answer) else read_picture(data)
        if picture is not None:
            self._source.has_pictures = True
            self._source.keep(self._tile, answer, data)
            return picture
        self._bad.append(data)
        same = self._bad.count(data)
        if not _is_text(answer) and same > 1:
            return None
        if same >= _SAME_TEXTS and self._source.has_pictures:
            return None
        what = (
            "a page of text in place of a picture" if _is_text(answer) else "a picture that does not decode"
        )
        raise UnusableError(f"it sent {what}")


def template_of(description: SourceDescription) -> UrlTemplate:
    """Return the template of a description; raises SourceError for one that cannot be used."""
    return UrlTemplate(description.template, subdomains=description.subdomains, headers=description.headers)


def identity_of(description: SourceDescription, template: UrlTemplate) -> str:
    """Return what tells a server's pictures from others: its template without keys, and what is none."""
    return fingerprint(template.identity, str(description.tile_size), *sorted(description.placeholders))


def _is_text(answer: Answer) -> bool:
    kind = answer.headers.get("content-type", "").lower()
    return kind.startswith(_TEXT_TYPES) or answer.body.lstrip()[:1] in (b"<", b"{")
