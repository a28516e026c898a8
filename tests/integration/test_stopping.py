"""Signals to runs: the saved state, the messages and the remaining processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import Callback
from support import REPOSITORY, TINY, environment, is_running, options, run_here

from job.process.descendants import descendants
from job.resilience import attempts

pytestmark = pytest.mark.integration


class Interrupt(Callback):
    """Send a signal to this process at a step, or in a validation outside fit."""

    def __init__(self, name: str, step: int = 3) -> None:
        self.signal = signal.Signals[name]
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signal)

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.state.fn == "validate":
            os.kill(os.getpid(), self.signal)


def interrupting(name: str) -> str:
    return json.dumps([{"class_path": "test_stopping.Interrupt", "init_args": {"name": name}}])


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGHUP", 129), ("SIGTERM", 143)])
def test_a_stopped_fit_saves_and_resumes(name: str, code: int, colours: Path, tmp_path: Path) -> None:
    arguments = ["fit", *options(TINY, data__root=colours, run_dir=tmp_path / "run")]
    first = run_here(*arguments, f"--trainer.callbacks={interrupting(name)}")
    assert first.returncode == code, first.output
    assert f"{name}: saving the state" in first.output
    assert "stopped on request after step 4, which is saved in" in first.output
    assert "The same command goes on from there" in first.output
    record = attempts.read(str(tmp_path / "run"))
    assert record is not None
    assert (record.failed, record.lost) == (0, 0)
    second = run_here(*arguments)
    assert second.returncode == 0, second.output
    assert "resuming after step 4" in second.output
    assert attempts.read(str(tmp_path / "run")) is None


def test_validate_stopped_by_a_signal_prints_one_line(colours: Path, tmp_path: Path) -> None:
    arguments = options(TINY, data__root=colours, run_dir=tmp_path / "run", trainer__max_epochs=1)
    assert run_here("fit", *arguments).returncode == 0
    outcome = run_here("validate", *arguments, f"--trainer.callbacks={interrupting('SIGINT')}")
    assert outcome.returncode == 130, outcome.output
    assert outcome.output.endswith("\njob: stopped by SIGINT.\n")
    assert "Traceback" not in outcome.output


def test_an_unexpected_error_exits_with_70_and_one_line(colours: Path, tmp_path: Path) -> None:
    """After five consecutive ones the exit code is 2, since restarts do not help."""
    broken = json.dumps([{"class_path": "test_stopping.Broken"}])
    arguments = ["fit", *options(TINY, data__root=colours, run_dir=tmp_path / "run"), f"--trainer.callbacks={broken}"]
    for _ in range(attempts.MAX_FAILED):
        outcome = run_here(*arguments)
        assert outcome.returncode == 70, outcome.output
        assert "Traceback" in outcome.output
        assert outcome.output.splitlines()[-1].startswith("job: unexpected error: KeyError: 'lost'.")
    outcome = run_here(*arguments)
    assert outcome.returncode == 2
    assert "5 consecutive attempts ended without a new checkpoint" in outcome.output
    assert "KeyError: 'lost'" in outcome.output


class Broken(Callback):
    """Raise an unexpected exception."""

    def on_train_batch_start(self, *args: Any) -> None:
        raise KeyError("lost")


def test_the_demo_ends_with_all_its_processes(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "job", "demo", "--folder", str(tmp_path / "demo")],
            stdout=log,
            stderr=log,
            env=environment(),
            cwd=REPOSITORY,
            start_new_session=True,
        )
    deadline = time.monotonic() + 400
    while "Training on" not in (tmp_path / "log").read_text() or len(descendants(process.pid)) < 2:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    below = descendants(process.pid)
    process.terminate()
    assert process.wait(300) == 143, (tmp_path / "log").read_text()
    assert [pid for pid in below if is_running(pid)] == []
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().endswith("job: stopped by SIGTERM.\n")
