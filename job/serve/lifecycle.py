"""From start to end: starting, ready, draining.

A signal makes readiness false first. For ``drain_delay`` seconds requests are still accepted, each answer closing its
connection, so that load balancers look elsewhere. Then the server stops listening and finishes what it has accepted.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable

from job.process import temporary
from job.process.signals import StopSignals
from job.serve.batching import Batcher

log = logging.getLogger(__name__)

_END_SECONDS = 3.0
"""Time after ``grace`` at which the process is ended from outside of the main thread."""


class Lifecycle:
    """Whether requests are accepted, and until when they are finished.

    Args:
        batcher: the model.
        stopping: set when the server is to stop listening.
        grace: seconds from a signal to the end of the process.
        drain_delay: seconds of them until the end of listening.

    Attributes:
        is_draining: whether a signal came.
        in_flight: requests without an answer yet.
        abandoned: requests that were not finished in time.
    """

    def __init__(self, batcher: Batcher, stopping: asyncio.Event, grace: float, drain_delay: float) -> None:
        self.batcher = batcher
        self.stopping = stopping
        self.grace = grace
        self.drain_delay = drain_delay
        self.is_draining = False
        self.in_flight = 0
        self.abandoned = 0
        self._deadline: float | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.batcher.is_ready and not self.is_draining and self.batcher.is_alive

    @property
    def is_live(self) -> bool:
        """False where only a restart helps."""
        return self.batcher.is_alive

    @property
    def seconds_left(self) -> float:
        """Time to finish what was accepted."""
        return self.grace if self._deadline is None else max(self._deadline - time.monotonic(), 0)

    def drain(self) -> None:
        """Stop after ``drain_delay``; at once where nobody sends requests yet."""
        if not self.is_draining:
            delay = self.drain_delay if self.is_ready else 0.0
            self.is_draining = True
            self._deadline = time.monotonic() + self.grace
            asyncio.get_running_loop().call_later(delay, self.stopping.set)


class DrainSignals(StopSignals):
    """While the context lasts, the first signal drains the server.

    Args:
        grace: seconds from the signal to the end of the process.
        drain: called in the event loop.
    """

    consequence = "requests without an answer are lost."

    def __init__(self, grace: float, drain: Callable[[], None]) -> None:
        super().__init__(grace + _END_SECONDS, at_end=temporary.remove_all)
        self.drain = drain
        self._loop = asyncio.get_running_loop()

    def on_first(self, number: signal.Signals) -> None:
        """Wake the event loop."""
        self._loop.call_soon_threadsafe(self.drain)

    def announce(self, number: signal.Signals) -> None:
        """Log that the server drains."""
        log.warning("%s: finishing the requests that were accepted. A second Ctrl-C ends it at once.", number.name)
