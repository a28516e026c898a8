"""Attempts without progress are counted; preemptions and users' mistakes are not."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest

from job import storage
from job.errors import ConfigError, Preempted, RankLost, StorageOutage
from job.process.signals import Stopped
from job.resilience import attempts


@pytest.fixture(autouse=True)
def patience_with_a_slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk to which other programs write a lot takes longer than the end of a run waits for it."""
    monkeypatch.setattr(attempts, "WRITE_SECONDS", 300.0)


def start(run_dir: Path, error: BaseException | None, step: int = 7, configuration: str = "a") -> None:
    before = attempts.begin(str(run_dir), step, configuration)
    if error is None:
        with attempts.counted(str(run_dir), before):
            return
    with pytest.raises(type(error)), attempts.counted(str(run_dir), before):
        raise error


def test_repeated_failures_end_the_run_with_their_cause(tmp_path: Path) -> None:
    for _ in range(attempts.MAX_FAILED):
        start(tmp_path, RuntimeError("no luck\nat all"))
    with pytest.raises(
        ConfigError, match=r"(?s)5 consecutive attempts .* after step 7.* RuntimeError: no luck.*attempts\.json"
    ):
        attempts.begin(str(tmp_path), 7, "a")
    (tmp_path / attempts.FILE).unlink()
    start(tmp_path, None)


@pytest.mark.parametrize("change", [{"step": 8}, {"configuration": "b"}])
def test_progress_or_another_configuration_resets_the_count(change: dict[str, object], tmp_path: Path) -> None:
    for _ in range(attempts.MAX_FAILED):
        start(tmp_path, StorageOutage("gone"))
    start(tmp_path, None, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [Preempted("x"), Stopped("x", 130), ConfigError("x")])
def test_preemptions_and_mistakes_are_not_counted(error: BaseException, tmp_path: Path) -> None:
    start(tmp_path, RuntimeError("once"))
    for _ in range(3 * attempts.MAX_LOST):
        start(tmp_path, error)
    attempt = attempts.read(str(tmp_path))
    assert attempt is not None
    assert (attempt.failed, attempt.lost) == (1, 0)


def test_attempts_that_end_without_a_trace_are_bounded(tmp_path: Path) -> None:
    for _ in range(attempts.MAX_LOST - 1):
        attempts.begin(str(tmp_path), 7, "a")  # killed: its end is not recorded
    start(tmp_path, RankLost("another rank"))
    with pytest.raises(ConfigError, match="20 consecutive attempts"):
        attempts.begin(str(tmp_path), 7, "a")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": 0, "step": 1, "configuration": ""}', b'{"format": 1, "step": 1}', b"\xff", b"null"],
)
def test_a_damaged_record_is_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / attempts.FILE).write_bytes(content)
    assert attempts.read(str(tmp_path)) is None
    start(tmp_path, None)


def test_a_newer_record_is_refused_and_kept(tmp_path: Path) -> None:
    content = msgspec.json.encode({"format": 2, "anything": 1})
    (tmp_path / attempts.FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="format 2"):
        attempts.begin(str(tmp_path), 7, "a")
    assert (tmp_path / attempts.FILE).read_bytes() == content


def test_an_outage_does_not_delay_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, answered = attempts.begin(str(tmp_path), 7, "a"), threading.Event()
    monkeypatch.setattr(attempts, "WRITE_SECONDS", 0.1)
    monkeypatch.setattr(storage, "write_bytes", lambda *_: answered.wait(300))
    with (
        caplog.at_level("INFO"),
        pytest.raises(StorageOutage),
        attempts.counted(str(tmp_path), before),
    ):
        raise StorageOutage("gone")
    answered.set()
    assert "is not updated: writing attempts.json has not returned" in caplog.text
    attempt = attempts.read(str(tmp_path))
    assert attempt is not None
    assert (attempt.failed, attempt.lost) == (0, 1)
