"""The errors that geoengine raises for what a caller can cause; commands turn each into exit status 2."""


class GeoEngineError(Exception):
    """Base of all errors below; its text is one plain sentence that says what to do."""


class TileError(GeoEngineError):
    """A tile address, coordinate, zoom or level does not exist."""


class PhotoError(GeoEngineError):
    """A photo cannot be read."""


class PhotoKindError(PhotoError):
    """A file is no image of a kind that can be read."""


class PhotoSizeError(PhotoError):
    """A photo has more pixels than the limit."""


class SourceError(GeoEngineError):
    """A tile source cannot be opened, or does not answer."""


class BundleError(GeoEngineError):
    """An engine bundle is missing, damaged, or written by a newer version."""


class BackendError(GeoEngineError):
    """A backend cannot run here."""


class ExportError(GeoEngineError):
    """Encoders cannot be loaded, exported, or fail a check."""


class MissingExtraError(GeoEngineError):
    """The packages of an optional extra are not installed."""
