"""What can go wrong in training, beyond the errors of the engine and of the export."""

from __future__ import annotations

from geoengine.engine.errors import GeoEngineError


class TrainingError(GeoEngineError):
    """Training cannot start, go on, or keep its files."""
