"""Metrics of the server in the format of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

if TYPE_CHECKING:
    from job.predict.predictor import Predictor

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters, gauges and histograms, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a further series for each
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        labels = ["route", "status"]
        self.requests = Counter("job_serve_requests", "Requests.", labels, registry=registry)
        self.seconds = Histogram(
            "job_serve_request_seconds", "Time to answer a request.", ["route"], buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram("job_serve_batch_size", "Images per batch.", buckets=BATCH_SIZES, registry=registry)
        self.batch_seconds = Histogram(
            "job_serve_batch_seconds", "Time to compute a batch.", buckets=SECONDS, registry=registry
        )
        self.unreadable = Counter("job_serve_unreadable_images", "Images that could not be read.", registry=registry)
        self.queue = Gauge("job_serve_queue_images", "Images that wait or are computed.", registry=registry)
        self.in_flight = Gauge("job_serve_requests_in_flight", "Requests without an answer yet.", registry=registry)
        self.ready = Gauge("job_serve_ready", "1 if the server accepts requests.", registry=registry)
        self.model = Info("job_serve_model", "The model.", registry=registry)

    def set_model(self, predictor: Predictor) -> None:
        """Say which model is served."""
        self.model.info(
            {
                "sha256": predictor.fingerprint,
                "backbone": predictor.net.name,
                "classes": str(len(predictor.classes)),
                "device": str(predictor.device),
            }
        )

    def observe_batch(self, images: int, seconds: float) -> None:
        """Count a batch."""
        self.batch_size.observe(images)
        self.batch_seconds.observe(seconds)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self.registry)
