"""Around the application: log, metrics, headers, and answers to what went wrong."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from job.serve.lifecycle import Lifecycle
from job.serve.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""Status by which nginx logs a request whose client has closed the connection."""
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
OTHER = "other"
"""Route of all paths that do not exist: whatever clients send becomes no label and no line of the log."""


class AccessLog:
    """Logs and counts the requests of an application.

    Neither the query, nor headers, nor anything of a body is logged.

    Args:
        app: the application.
        routes: its paths.
        quiet: paths of probes and metrics, whose answers with status 200 or 503 are not logged.
        lifecycle: whether the server drains.
        metrics: of the server.
    """

    def __init__(
        self, app: ASGIApp, routes: Collection[str], quiet: Collection[str], lifecycle: Lifecycle, metrics: Metrics
    ) -> None:
        self.app = app
        self.routes = frozenset(routes)
        self.quiet = frozenset(quiet)
        self.lifecycle = lifecycle
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        status = 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), *HEADERS]
                if self.lifecycle.is_draining:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        self.lifecycle.in_flight += 1
        try:
            await self.app(scope, receive, counted_send)
        except asyncio.CancelledError:  # the server has waited long enough
            self.lifecycle.abandoned += 1
            if not status:
                await _send_error(counted_send, 503, "the server stops. Try again later.")
        except Exception:
            log.exception("a request failed:")
            if not status:
                await _send_error(counted_send, 500, "internal error. See the log of the server.")
        finally:
            self.lifecycle.in_flight -= 1
            self._record(scope, status or CLIENT_GONE, time.perf_counter() - began)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in self.routes else OTHER
        self.metrics.observe_request(route, status, seconds)
        if route in self.quiet and status in (200, 503):
            return
        client = scope["client"][0] if scope.get("client") else "-"
        fields = {"route": route, "status": status, "client": client, "milliseconds": round(1000 * seconds, 1)}
        level = logging.WARNING if status >= 500 else logging.INFO
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS") else OTHER
        log.log(level, "%s %s %d %.1f ms", method, route, status, 1000 * seconds, extra={"fields": fields})


async def _send_error(send: Send, status: int, message: str) -> None:
    body = msgspec.json.encode({"error": message})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
