"""What Prometheus is told: requests, latencies of stages, batches and the queue. No place, no photo."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from geoengine.engine.batching import BatchDone, EncoderState
from geoengine.service.limits import Admission

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_PICTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The figures of one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "geoengine_requests", "Requests answered.", ("route", "status"), registry=self.registry
        )
        self._latency = Histogram(
            "geoengine_request_seconds",
            "Time from a request's first byte to its last.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stages = Histogram(
            "geoengine_stage_seconds",
            "Time of a located photo's stages: receive, decode, wait (for its turn), embed, level.",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batches = Histogram(
            "geoengine_batch_pictures", "Pictures in a batch.", buckets=_PICTURES, registry=self.registry
        )
        self._searches = Histogram(
            "geoengine_batch_searches", "Searches in a batch.", buckets=_PICTURES, registry=self.registry
        )
        self._encoding = Histogram(
            "geoengine_batch_seconds", "Time of a batch.", buckets=_SECONDS, registry=self.registry
        )
        self._failed = Counter(
            "geoengine_pictures_failed", "Pictures that could not be encoded.", registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """Note the time of a stage."""
        self._stages.labels(stage).observe(seconds)

    def batch(self, batch: BatchDone) -> None:
        """Note a batch of the encoders."""
        self._batches.observe(batch.pictures)
        self._searches.observe(batch.searches)
        self._encoding.observe(batch.seconds)
        self._failed.inc(batch.failed)

    def watch(self, state: Callable[[], EncoderState], admission: Admission, rows: Callable[[], int]) -> None:
        """Tell the queue's and the encoders' state whenever figures are asked for."""
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "geoengine_searching": ("Requests that are searched.", lambda: admission.searching),
            "geoengine_waiting": ("Requests that wait for their turn.", lambda: admission.waiting),
            "geoengine_pictures_waiting": ("Pictures that wait for a batch.", lambda: state().waiting),
            "geoengine_encoder_busy_seconds": ("Time of the batch under way.", lambda: state().busy_s),
            "geoengine_pictures_encoded": ("Pictures encoded.", lambda: state().encoded),
            "geoengine_pictures_shared": (
                "Pictures that another search was waiting for already.",
                lambda: state().shared,
            ),
            "geoengine_pictures_known": ("Pictures whose embedding was kept.", lambda: state().known),
            "geoengine_rows_kept": ("Embeddings of tiles in memory.", rows),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Return the figures as Prometheus reads them."""
        return generate_latest(self.registry)
