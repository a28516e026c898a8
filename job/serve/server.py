"""The process of the server: socket, event loop, signals and end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import sys
from collections.abc import Callable

from job.errors import ConfigError
from job.predict.predictor import Predictor
from job.process.ending import end_process
from job.process.signals import Stopped
from job.process.terminal import say
from job.serve.app import create_app
from job.serve.batching import Batcher
from job.serve.connections import Server, ServerConfig
from job.serve.lifecycle import DrainSignals, Lifecycle
from job.serve.metrics import Metrics
from job.serve.settings import Settings

log = logging.getLogger(__name__)

SPARE_FILES = 256
"""File descriptors beside those of connections: libraries, weights, metrics."""
BACKLOG = 2048
"""Connections that wait, as uvicorn's default; the kernel may allow fewer."""
SWITCH_SECONDS = 0.0005
"""Time after which a thread of Python hands over to another one, which is 5 ms by default: the model's thread would
wait that long for the event loop after each of its operations."""


def serve(load: Callable[[], Predictor], settings: Settings) -> None:
    """Serve a model until a signal.

    Args:
        load: loads the model; called in a thread, while probes are answered.
        settings: of the server.

    Raises:
        ConfigError: the address cannot be listened on.
        JobError: the model cannot be loaded.
        Stopped: a signal came, and requests were not finished within ``grace``.
    """
    with listen(settings.host, settings.port) as listener:
        _allow_files(settings.limits.max_connections + SPARE_FILES)
        address = _address(settings.host, listener)
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            asyncio.run(_serve(load, settings, listener, address))
        finally:
            sys.setswitchinterval(before)


def build_server(load: Callable[[], Predictor], settings: Settings) -> Server:
    """A server for the running event loop; its ``lifecycle`` has the model's queue."""
    stopping = asyncio.Event()
    metrics = Metrics()
    batcher = Batcher(load, settings, metrics, on_failure=stopping.set)
    lifecycle = Lifecycle(batcher, stopping, settings.grace, settings.drain_delay)
    app = create_app(batcher, lifecycle, metrics, settings)
    return Server(ServerConfig(app, settings.limits), lifecycle)


async def _serve(load: Callable[[], Predictor], settings: Settings, listener: socket.socket, address: str) -> None:
    server = build_server(load, settings)
    lifecycle = server.lifecycle
    batcher = lifecycle.batcher
    with DrainSignals(settings.grace, lifecycle.drain) as signals:
        say(f"listening at {address} (Ctrl-C ends it)")
        batcher.start()
        await server.serve([listener])
        await asyncio.sleep(0)  # uvicorn has just cancelled what was not finished
        unfinished = lifecycle.abandoned
        has_ended = batcher.close()
        if batcher.failure is not None:
            raise batcher.failure
        if unfinished:
            name = "a signal" if signals.first is None else signals.first.name
            raise Stopped(
                f"stopped by {name}: {unfinished} request(s) were not finished within --grace {settings.grace:g}.",
                signals.exit_code,
            )
        log.info("stopped; every request that was accepted has its answer")
        if not has_ended:  # weights that are still read, say: Python would wait for the thread
            end_process(0)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens: connections wait in its queue until the server accepts them.

    Raises:
        ConfigError: there is no such address, or its port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}. Use an address of this machine.") from error
    # localhost may have one of each family, and clients that try IPv6 first also try IPv4.
    family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another --host or --port."
        ) from error
    return listener


def _address(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def _allow_files(count: int) -> None:
    """Raise the limit of open files, as far as that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, soft), hard))
        if wanted < count:
            log.warning("only %d files may be open: --max_connections cannot be reached (see ulimit -n)", wanted)
