"""The watchdog terminates only a rank that hangs."""

from __future__ import annotations

import os
import threading
import time

import pytest

from job.resilience import watchdog as module
from job.resilience.watchdog import Progress, Watchdog, WatchdogSettings


class Ended(BaseException):
    pass


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(module.faulthandler, "dump_traceback", lambda **_: None)
    return codes


def idle(seconds: float, limit: float = 60.0) -> Watchdog:
    """A watchdog whose rank has made no progress for a time, while its thread ran."""
    dog = Watchdog(WatchdogSettings())
    dog._progress = Progress("training", 7, time.monotonic() - seconds, limit)
    return dog


def test_a_rank_without_progress_is_terminated(exits: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Ended):
        idle(61)._watch()
    assert exits == [75]
    assert "has made no progress for 61 s, training at step 7 (limit 60 s)" in capsys.readouterr().err
    idle(59)._watch()


def test_the_limit_belongs_to_the_phase_of_the_progress(exits: list[int]) -> None:
    """A phase with a longer limit may begin at any moment; mixing the two would terminate a healthy rank."""
    dog = idle(61)
    consistent = dog._waiting

    def and_then_a_save_begins() -> tuple[Progress, float]:
        state = consistent()
        dog._expect_anything("saving", 7)
        return state

    dog._waiting = and_then_a_save_begins  # type: ignore[method-assign]
    dog._watch()
    assert exits == []


def test_a_hanging_store_does_not_block_the_watchdog(
    exits: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered, ended = threading.Event(), list[bool]()

    class Store:
        def set(self, *_: object) -> None:
            ended.append(answered.wait(240))

        def check(self, *_: object) -> bool:
            ended.append(answered.wait(240))
            return ended[-1]

    monkeypatch.setattr(module, "STORE_SECONDS", 0.1)
    dog = idle(61)
    dog._store = Store()
    with pytest.raises(Ended):
        dog._watch()
    assert not ended
    assert "rank 0: has published no state" in capsys.readouterr().err
    answered.set()


def test_a_stopped_process_is_not_terminated_when_it_is_resumed(
    exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = idle(0)
    dog._watch()
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 500)  # SIGSTOP: this thread did not run, either
    dog._watch()
    assert exits == []
    for seconds in range(505, 550, 5):
        monkeypatch.setattr(module.time, "monotonic", lambda seconds=seconds: now + seconds)
        dog._watch()
    assert exits == []
    with pytest.raises(Ended):  # it hangs, all the same
        for seconds in range(550, 600, 5):
            monkeypatch.setattr(module.time, "monotonic", lambda seconds=seconds: now + seconds)
            dog._watch()


def test_the_published_state_of_other_ranks_is_checked(exits: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    class Store:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def check(self, _: object) -> bool:
            return True

        def get(self, _: object) -> bytes:
            return self.content

    for content in (b"", b"{", b'{"phase": 1}', b"[" * 100_000):
        dog = idle(61)
        dog._store = Store(content)
        with pytest.raises(Ended):
            dog._watch()
        assert "rank 0: has published no state" in capsys.readouterr().err
    dog._store = Store(b'{"phase": "saving", "step": 3, "waiting": 9.0, "published_at": 1.0}')
    assert "rank 0: saving, step 3, no progress for 9 s" in dog._others()
    assert "this rank is stopped or gone" in dog._others()


def test_a_notebooks_process_is_not_terminated(exits: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """In a notebook only the stacks are printed, after each limit."""
    dog = Watchdog(WatchdogSettings(), ends_process=False)
    for _ in range(2):
        dog._progress = Progress("training", 7, time.monotonic() - 61, 60.0)
        dog._watch()
        assert "no progress for 61 s, training at step 7 (limit 60 s). Its stacks" in capsys.readouterr().err
        dog._watch()
        assert not capsys.readouterr().err
    assert exits == []
