"""Settings of the server: routes, limits and times, checked before the model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from job.errors import ConfigError

DEFAULT_PORT = 8080
"""The port that Vertex AI and KServe expect by default."""
MAX_IMAGE_PIXELS = 64_000_000
"""Pixels of the largest image by default: photographs of phones have up to 50 million."""
MEGABYTE = 1_000_000
_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
_ROUTE = re.compile(r"/[\w./:@~-]*", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """What the server accepts.

    Attributes:
        max_batch_size: images that the model computes at once.
        max_wait_ms: milliseconds that an image waits for others that are decoded.
        max_queue: images that wait or are computed, of all requests; a request beyond it gets status 429.
        max_instances: images per request.
        max_body_mb: megabytes per request.
        max_pending_mb: megabytes of all requests that are held in memory.
        max_image_pixels: height times width of the largest image.
        max_connections: open connections.
        timeout: seconds for a request: for its body to arrive, and then for its predictions.
    """

    max_batch_size: int = 32
    max_wait_ms: float = 5.0
    max_queue: int = 512
    max_instances: int = 128
    max_body_mb: float = 32.0
    max_pending_mb: float = 512.0
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_connections: int = 1024
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue", "max_instances", "max_image_pixels", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("max_body_mb", "max_pending_mb", "timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"--{name} must be a number above 0, not {getattr(self, name)}.")
        if not 0 <= self.max_wait_ms <= 10_000:
            raise ConfigError(f"--max_wait_ms must be from 0 to 10000, not {self.max_wait_ms}.")
        if self.max_queue < self.max_instances:
            raise ConfigError(
                f"--max_queue {self.max_queue} has no room for a request of --max_instances {self.max_instances} "
                "images."
            )
        if self.max_pending_mb < self.max_body_mb:
            raise ConfigError(
                f"--max_pending_mb {self.max_pending_mb:g} has no room for a request of --max_body_mb "
                f"{self.max_body_mb:g}."
            )


@dataclass(frozen=True)
class Settings:
    """How the server runs.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0: any free one.
        name: the model's name in the routes of KServe's protocols.
        predict_route: a further route of predictions, as Vertex AI chooses it.
        health_route: a further route of readiness, as Vertex AI chooses it.
        limits: what is accepted.
        num_workers: decoding threads.
        grace: seconds from a signal to the end of the process.
        drain_delay: seconds of them in which requests are still accepted, for load balancers to look elsewhere.
    """

    host: str = "localhost"
    port: int = DEFAULT_PORT
    name: str = "model"
    predict_route: str | None = None
    health_route: str | None = None
    limits: Limits = field(default_factory=Limits)
    num_workers: int = 1
    grace: float = 25.0
    drain_delay: float = 5.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"--name {self.name!r} cannot be part of a URL: use at most 63 letters, digits, hyphens, dots and "
                "underscores."
            )
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port must be from 0 to 65535, not {self.port}.")
        if self.num_workers < 1:
            raise ConfigError(f"--num_workers must be at least 1, not {self.num_workers}.")
        if not 0 <= self.drain_delay < self.grace < float("inf"):
            raise ConfigError(
                f"--drain_delay {self.drain_delay:g} must be at least 0 and below --grace {self.grace:g}."
            )
        for variable, route in (("AIP_PREDICT_ROUTE", self.predict_route), ("AIP_HEALTH_ROUTE", self.health_route)):
            if route is not None and not _ROUTE.fullmatch(route):
                raise ConfigError(f"{variable} {route!r} is no path of a URL, such as /predict.")
        if self.predict_route is not None and self.predict_route == self.health_route:
            raise ConfigError(f"AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE are both {self.health_route}.")


@dataclass(frozen=True)
class VertexEnvironment:
    """What Vertex AI sets in a serving container.

    Source: https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements#aip-variables

    Attributes:
        port: AIP_HTTP_PORT.
        predict_route: AIP_PREDICT_ROUTE.
        health_route: AIP_HEALTH_ROUTE.
        storage_uri: AIP_STORAGE_URI, a copy of the folder that was uploaded with the model.
    """

    port: int | None = None
    predict_route: str | None = None
    health_route: str | None = None
    storage_uri: str | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> VertexEnvironment:
        """Read the variables; all are None elsewhere.

        Raises:
            ConfigError: AIP_HTTP_PORT is no number.
        """
        port = environment.get("AIP_HTTP_PORT") or None
        if port is not None and not (port.isascii() and port.isdecimal()):
            raise ConfigError(f"AIP_HTTP_PORT must be a port, not {port!r}.")
        return cls(
            None if port is None else int(port),
            environment.get("AIP_PREDICT_ROUTE") or None,
            environment.get("AIP_HEALTH_ROUTE") or None,
            environment.get("AIP_STORAGE_URI") or None,
        )
