"""GeoCLIP's location encoder: points on Earth to embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.backends import ONNXRUNTIME_CPU
from geoengine.engine.backends.sessions import Sessions, first_line
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.cores import available_cores
from geoengine.engine.errors import BackendError, BundleError

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

SEAM_KM = 100.0
"""How far from the antimeridian a point is seen from both sides: within the reach of the middle kernel."""

_KM_PER_DEGREE = 111.19508
_BATCH = 1024  # points in one run; bounds memory to some 20 MB


class LocationEncoder:
    """Embeds points with a function that runs the graph: float32[n, 2] in degrees to unit float32[n, width].

    `open` is the usual way to make one. May be called from several threads at once.
    """

    def __init__(self, run: Callable[[NDArray[np.float32]], NDArray[np.float32]], width: int) -> None:
        self._run, self._width = run, width

    @classmethod
    def open(cls, bundle: EngineBundle, *, threads: int | None = None) -> LocationEncoder:
        """Run a bundle's graph in ONNX Runtime on the CPU, whatever runs the photo encoder.

        A search asks for a few hundred points at most, each once. The graph is loaded when it is first
        needed. Raises BundleError for a bundle without one.
        """
        if bundle.manifest.geoclip is None:
            raise BundleError(f"engine bundle {bundle.path} has no location encoder")
        path = bundle.path / bundle.manifest.geoclip.location

        def configure(options: SessionOptions) -> None:
            options.intra_op_num_threads = available_cores() if threads is None else threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        sessions = Sessions(bundle, ONNXRUNTIME_CPU, ("CPUExecutionProvider", {}), configure)

        def run(points: NDArray[np.float32]) -> NDArray[np.float32]:
            session = sessions.get(path)
            try:
                (embeddings,) = session.run(["embedding"], {"points": points})
            except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
                raise BackendError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from error
            return np.asarray(embeddings)

        return cls(run, bundle.embed_dim)

    def embed(self, points: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return unit embeddings, float32[n, d], of points float64[n, 2], longitude and latitude in degrees.

        The encoder's map of the world ends at the antimeridian: two points that face each other across it lie
        on its two ends and have unlike embeddings. So a point within SEAM_KM of it gets the mean of what the
        encoder says of the place itself and of the same place beyond the other end, with weights from 1 and 0
        to half and half at the antimeridian, where both sides then agree. Scoring the mean is scoring both.
        """
        lng, lat = np.asarray(points, dtype=np.float64).reshape(-1, 2).T
        lng = (lng + 180) % 360 - 180
        own = self.embed_plain(np.stack([lng, lat], axis=1))
        distance_km = (180 - np.abs(lng)) * _KM_PER_DEGREE * np.cos(np.radians(lat))
        near = np.flatnonzero(distance_km < SEAM_KM)
        if len(near):
            beyond = lng[near] - np.where(lng[near] < 0, -360, 360)
            other = self.embed_plain(np.stack([beyond, lat[near]], axis=1))
            weight = (0.5 + 0.5 * distance_km[near, None] / SEAM_KM).astype(np.float32)
            mean = weight * own[near] + (1 - weight) * other
            own[near] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return own

    def embed_plain(self, points: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return what the encoder itself says, float32[n, d]: the package's own embeddings, of length 1."""
        embeddings = np.empty((len(points), self._width), dtype=np.float32)
        for start in range(0, len(points), _BATCH):
            batch = points[start : start + _BATCH].astype(np.float32)
            embeddings[start : start + len(batch)] = self._run(batch)
        return embeddings
