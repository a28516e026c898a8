"""Background threads that survive errors and do not keep a process from ending."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

STOP_SECONDS = 10.0
"""Seconds to wait for a background call at the end of a process; it may hang in a request."""

REPORT_SECONDS = 60.0
"""Seconds between two log lines about a function that keeps failing."""


class Periodic:
    """Calls a function at intervals in a daemon thread.

    An exception does not end the thread: the first one of a series is logged with its traceback, the following ones by
    one line per minute.

    Args:
        name: of the thread.
        seconds: between the end of a call and the next call, or a function that returns it.
        function: called in the thread.
    """

    def __init__(self, name: str, seconds: float | Callable[[], float], function: Callable[[], None]) -> None:
        self.name = name
        self._seconds = seconds if callable(seconds) else lambda: seconds
        self._function = function
        self._stopping = threading.Event()
        self._failures = 0
        self._reported_at = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self, timeout: float = STOP_SECONDS) -> bool:
        """Make no further call, and wait for one in progress; returns False if that one has not returned in time."""
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():
                log.warning(
                    "the background thread %s is still busy after %.0f s and is left behind", self.name, timeout
                )
                return False
        return True

    def _run(self) -> None:
        while not self._stopping.wait(self._interval()):
            try:
                self._function()
            except Exception as error:
                self._report(error)
            else:
                if self._failures:
                    log.info("the background thread %s works again after %d failure(s)", self.name, self._failures)
                self._failures = 0

    def _interval(self) -> float:
        try:
            return self._seconds()
        except Exception as error:
            self._report(error)
            return STOP_SECONDS

    def _report(self, error: Exception) -> None:
        self._failures += 1
        now = time.monotonic()
        if self._failures == 1:
            log.error("the background thread %s failed, and tries again:", self.name, exc_info=error)
        elif now - self._reported_at >= REPORT_SECONDS:
            log.error("the background thread %s failed %d times in a row: %r", self.name, self._failures, error)
        else:
            return
        self._reported_at = now


def call_within(seconds: float, function: Callable[[], T], name: str) -> T:
    """Call a function in a daemon thread and return its result, or raise its exception.

    Raises:
        TimeoutError: it has not returned after ``seconds``; the call is left behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"{name} has not returned after {seconds:.0f} s")
    return results[0]
