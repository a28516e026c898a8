"""Connections: their number, and clients that send or read too slowly. uvicorn limits neither.

``tests/unit/test_serve_connections.py`` shows what is relied upon of uvicorn's protocol for h11.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from job.serve.lifecycle import Lifecycle
from job.serve.settings import Limits

HEADER_SECONDS = 10.0
"""Time for the header of a request to arrive, from the beginning of the connection or from its first byte."""
KEEP_ALIVE_SECONDS = 620
"""Time that an idle connection stays open: longer than Google's load balancers keep theirs (600 s), which would
otherwise send a request just when it is closed."""
MOST_HEADER_BYTES = 32_768
_SETTLE_SECONDS = 0.2
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b'content-length: 33\r\n\r\n{"error":"too many connections."}'
)


class ServerConfig(uvicorn.Config):
    """Configuration of uvicorn, and of :class:`Connection`.

    Args:
        app: the application.
        limits: of connections and times.
    """

    def __init__(self, app: Callable[..., object], limits: Limits) -> None:
        super().__init__(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="error",  # clients cause its warnings
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        )
        self.limits = limits


class Connection(H11Protocol):
    """A connection that is closed when its client does not keep up, or when there are too many."""

    config: ServerConfig

    _timer: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection if there are too many; idle ones make room."""
        super().connection_made(transport)
        if len(self.connections) > self.config.limits.max_connections and not self._close_an_idle_one():
            self._is_refused = True
            transport.write(_REFUSAL)
            transport.close()
        else:
            self._start_timer(HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a header, or of a body that is not read, for a limited time."""
        if self._is_refused:
            return
        super().data_received(data)
        if self._is_in_request:
            if not self.flow.write_paused:  # else a client that does not read could keep the connection by sending
                self._stop_timer()
        elif self._timer is None:
            self._start_timer(HEADER_SECONDS)

    def on_response_complete(self) -> None:
        """Wait for the client to read the answer, or for the header that it has begun, for a limited time."""
        super().on_response_complete()
        if self._is_in_request:
            return
        if self.transport.get_write_buffer_size() > 0:
            self._start_timer(self.config.limits.timeout, self._abort_unless_read)
        else:
            self._wait_for_rest_of_header()

    def pause_writing(self) -> None:
        """Wait for the client to read the answer for a limited time."""
        super().pause_writing()
        self._start_timer(self.config.limits.timeout)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._stop_timer()
        self._wait_for_rest_of_header()

    @property
    def is_idle(self) -> bool:
        """Whether a request was answered, and no other has begun."""
        return self.cycle is not None and self.cycle.response_complete and self._timer is None

    @property
    def _is_in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_an_idle_one(self) -> bool:
        for each in self.connections:
            if isinstance(each, Connection) and each.is_idle:
                each.shutdown()
                self.connections.discard(each)
                return True
        return False

    def _wait_for_rest_of_header(self) -> None:
        if not self._is_in_request and self.conn.trailing_data[0]:
            self._start_timer(HEADER_SECONDS)

    def _start_timer(self, seconds: float, at_end: Callable[[], None] | None = None) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, at_end or self._abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self) -> None:
        self._timer = None
        self.transport.abort()

    def _abort_unless_read(self) -> None:
        """The end of an answer that is too short to pause writing: nothing reports that the client has read it."""
        if self.transport.get_write_buffer_size() > 0:
            self._abort()
        else:
            self._stop_timer()
            self._wait_for_rest_of_header()


class Server(uvicorn.Server):
    """uvicorn's server, which stops by a :class:`~job.serve.lifecycle.Lifecycle` in place of its signal handlers.

    Args:
        config: of the server.
        lifecycle: when it stops.
    """

    def __init__(self, config: ServerConfig, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self.lifecycle = lifecycle

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled by :class:`~job.serve.lifecycle.DrainSignals`."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop listening; called ten times per second."""
        return await super().on_tick(counter) or self.lifecycle.stopping.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, then finish what was accepted."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(_SETTLE_SECONDS)  # a connection that was just accepted has sent its request by then
        self.config.timeout_graceful_shutdown = max(int(self.lifecycle.seconds_left), 1)
        await super().shutdown(sockets)
