"""Processes that contend for one run_dir while they are stopped and resumed: one of them writes at a time."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from contention import contend
from harness import Job, descendants, fit_options
from support import scalars

from job import checkpoint, storage
from job.monitoring import accounting

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("place", ["bucket", "disk"])
def test_a_process_that_was_stopped_writes_nothing_after_another_has_the_lease(
    place: str, run_dir: str, tmp_path: Path
) -> None:
    """tests/faults/contention.py has the long version."""
    outcome = contend(run_dir if place == "bucket" else str(tmp_path / "run"), tmp_path / "logs", rounds=3)
    assert outcome.takeovers >= 3 - outcome.blocked
    assert outcome.blocked <= (place == "disk")
    assert outcome.writes > 20
    assert outcome.late == 0


def test_a_fit_that_is_stopped_and_resumed_leaves_the_run_to_another(run_dir: str, tmp_path: Path) -> None:
    """Two jobs of one default run id; the first one ends by itself, and the curve is one."""
    pace = "[{class_path: saboteur.Pace, init_args: {seconds: 0.3}}]"
    arguments = fit_options(run_dir, trainer__callbacks=pace)
    first = Job.with_lease(tmp_path / "first", 3, *arguments)
    first.wait_for("epoch 1/")
    for pid in descendants(first.process.pid):
        os.kill(pid, signal.SIGSTOP)
    second = Job.with_lease(tmp_path / "second", 3, *arguments)
    second.wait_for("epoch 2: training")
    for pid in descendants(first.process.pid):
        os.kill(pid, signal.SIGCONT)
    assert first.wait() == 2, first.output
    assert "was taken over by another job" in first.output
    assert "Traceback" not in first.output
    assert second.wait() == 0, second.output
    assert [step for step, _ in scalars(run_dir)["train/loss"]] == list(range(24))
    assert checkpoint.newest_verified(run_dir) is not None
    assert not storage.exists(f"{run_dir}/lease.json")
    assert len(accounting.read(run_dir)) == 2
