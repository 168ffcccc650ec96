"""What can be wrong with a tile index."""

from geoengine.engine.errors import GeoEngineError


class TileIndexError(GeoEngineError):
    """A tile index cannot be used, or not for this search."""


class IndexFileError(TileIndexError):
    """A file of a tile index is damaged, or cannot be written."""
