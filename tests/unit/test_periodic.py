"""Background threads survive errors and do not block the end of the process."""

from __future__ import annotations

import threading
import time

import pytest
from support import wait_for

from job.process.periodic import Periodic, call_within


def test_an_error_is_logged_once_with_its_traceback_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def function() -> None:
        calls.append(1)
        if len(calls) < 10:
            raise KeyError("unexpected")

    with caplog.at_level("INFO"):
        thread = Periodic("worker", 0.005, function)
        wait_for(lambda: len(calls) > 12)
        assert thread.stop()
    assert caplog.text.count("Traceback") == 1
    assert "the background thread worker failed" in caplog.text
    assert "works again after 9 failure(s)" in caplog.text


def test_a_hanging_call_does_not_block_stopping(caplog: pytest.LogCaptureFixture) -> None:
    entered, leave = threading.Event(), threading.Event()

    def function() -> None:
        entered.set()
        leave.wait(240)

    thread = Periodic("worker", 0.0, function)
    assert entered.wait(120)
    began = time.monotonic()
    assert not thread.stop(timeout=0.1)
    assert time.monotonic() - began < 120
    assert "worker is still busy" in caplog.text
    leave.set()


def test_the_interval_may_change_and_fail(caplog: pytest.LogCaptureFixture) -> None:
    intervals = iter([0.0, 0.01])
    calls: list[int] = []
    thread = Periodic("worker", lambda: next(intervals), lambda: calls.append(1))
    wait_for(lambda: len(calls) == 2)
    thread.stop()
    assert "StopIteration" in caplog.text


def test_a_call_with_a_time_limit() -> None:
    assert call_within(60, lambda: 7, "seven") == 7
    assert call_within(60, lambda: None, "nothing") is None
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 / 0, "error")
    leave = threading.Event()
    with pytest.raises(TimeoutError, match="wait has not returned after 0 s"):
        call_within(0.05, lambda: leave.wait(240), "wait")
    leave.set()
