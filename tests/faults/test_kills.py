"""Kills, hangs and restarts: the job exits or recovers, and its result equals the uninterrupted run's."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from harness import STEPS, Job, fit_options, sabotage, wait_until_served
from proxy import FaultyProxy
from support import assert_same_weights, free_port, run_well, scalars

from job import checkpoint, storage
from job.monitoring import accounting

pytestmark = pytest.mark.integration


def test_a_rank_that_is_killed_restarts_the_job(run_dir: str, uninterrupted: str, tmp_path: Path) -> None:
    """torchrun restarts all ranks, which resume from the last committed checkpoint."""
    plot = sabotage(tmp_path / "marker", step=13, rank=1, name="SIGKILL")
    job = Job(tmp_path / "log", *fit_options(run_dir, trainer__callbacks=plot), processes=2, restarts=1, fresh=True)
    assert job.wait() == 0, job.output
    assert "another rank ended" in job.output
    # The upload of step 10 may be in progress at the kill; that of step 8 has ended before it.
    assert re.search("resuming after step (8|10),", job.output), job.output
    assert_same_weights(run_dir, uninterrupted)
    assert scalars(run_dir)["train/loss"] == scalars(uninterrupted)["train/loss"]
    records = accounting.read(run_dir)
    assert len(records) == 2
    assert accounting.totals(records)["recomputed"] > 0


def test_three_kills_in_a_row(run_dir: str, uninterrupted: str, tmp_path: Path) -> None:
    plot = sabotage(tmp_path / "marker", step=6, rank=0, name="SIGKILL", times=3)
    job = Job(tmp_path / "log", *fit_options(run_dir, trainer__callbacks=plot), processes=2, restarts=3)
    assert job.wait() == 0, job.output
    assert (tmp_path / "marker").read_text() == "xxx"
    assert_same_weights(run_dir, uninterrupted)
    assert scalars(run_dir)["train/loss"] == scalars(uninterrupted)["train/loss"]


def test_a_hanging_rank_is_reported_and_terminated(run_dir: str, uninterrupted: str, tmp_path: Path) -> None:
    plot = sabotage(tmp_path / "marker", step=13, rank=1, name="SIGSTOP")
    arguments = fit_options(run_dir, trainer__callbacks=plot, watchdog__min_seconds=8, watchdog__startup_seconds=300)
    job = Job(tmp_path / "log", *arguments, processes=2, restarts=1)
    assert job.wait() == 0, job.output
    assert "job: rank 0 has made no progress for" in job.output
    assert "most recent call first" in job.output  # where it hung
    assert "job: rank 1: " in job.output
    assert accounting.read(run_dir)[-1].first_step == 10
    assert len(accounting.read(run_dir)) == 2
    assert_same_weights(run_dir, uninterrupted)


def test_killed_in_the_middle_of_an_upload(
    run_dir: str, uninterrupted: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    """The state file of step 15 never arrives whole, so that the checkpoint of step 10 counts."""
    jobs: list[Job] = []

    def kill(request: object) -> None:
        if "uploadType" in request.path_qs and request.content_length and request.content_length > 100_000:  # type: ignore[attr-defined]
            sizes.append(request.content_length)  # type: ignore[attr-defined]
            if len(sizes) == 4 and jobs:  # steps 5, 8, 10 and then 15
                jobs.pop().kill()

    sizes: list[int] = []
    proxy.fault = kill  # type: ignore[assignment]
    arguments = fit_options(run_dir, monitoring__images=0)  # no other upload is as large
    first = Job(tmp_path / "log", *arguments, processes=2)
    jobs.append(first)
    assert first.wait() != 0
    proxy.fault = lambda request: None
    newest = checkpoint.newest_verified(run_dir)
    assert newest is not None
    assert newest.global_step == 10
    second = Job(tmp_path / "log2", *arguments, processes=2)
    assert second.wait() == 0, second.output
    assert "resuming after step 10," in second.output
    assert_same_weights(run_dir, uninterrupted)
    assert scalars(run_dir)["train/loss"] == scalars(uninterrupted)["train/loss"]


def test_a_damaged_newest_checkpoint(run_dir: str, uninterrupted: str, tmp_path: Path) -> None:
    """The newest has no manifest, and a bit of the one before is flipped: the run resumes from the third.

    tests/unit/test_checkpoint.py has the other kinds of damage.
    """
    plot = sabotage(tmp_path / "marker", step=13, rank=0, name="SIGTERM")
    first = Job(tmp_path / "log", *fit_options(run_dir, trainer__callbacks=plot, checkpoint__keep_last=3), processes=2)
    assert first.wait() != 0
    good, damaged, unfinished = checkpoint.manifests(run_dir)[-3:]
    storage.remove(checkpoint.manifest_uri(f"{run_dir}/checkpoints/{unfinished.file}"))
    uri = f"{run_dir}/checkpoints/{damaged.file}"
    content = storage.read_bytes(uri)
    storage.write_bytes(uri, content[:5000] + bytes([content[5000] ^ 16]) + content[5001:])
    second = Job(tmp_path / "log2", *fit_options(run_dir), processes=2)
    assert second.wait() == 0, second.output
    assert f"{uri} is damaged" in second.output
    assert f"resuming after step {good.global_step}," in second.output
    assert_same_weights(run_dir, uninterrupted)


def test_two_jobs_on_one_run_dir(run_dir: str, tmp_path: Path) -> None:
    """The second job is refused; the first is not disturbed."""
    slow = fit_options(run_dir, trainer__max_epochs=600)
    first = Job(tmp_path / "log", *slow, processes=2)
    first.wait_for("epoch 2: training")
    second = Job(tmp_path / "log2", *fit_options(run_dir))
    assert second.wait() == 2, second.output
    assert f"another job is writing to {run_dir}" in second.output
    assert "Traceback" not in second.output
    assert first.process.poll() is None
    os.kill(first.process.pid, signal.SIGTERM)
    first.wait()
    assert "stopped on request" in first.output


def test_another_world_size(run_dir: str, tmp_path: Path) -> None:
    """Preempted with 2 processes, resumed with 1 and with 4: the losses are equal up to rounding."""
    settings = {
        "model__backbone": "timm/test_vit",
        "model__optimizer": "{class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}",
        "data__image_size": 160,
    }
    without_faults = str(tmp_path / "whole")
    run_well(*fit_options(without_faults, **settings), processes=2)
    expected = [value for _, value in scalars(without_faults)["train/loss"]]
    for processes in (1, 4):
        one = f"{run_dir}/{processes}"
        plot = sabotage(tmp_path / f"marker{processes}", step=11, rank=1)
        first = Job(tmp_path / "log", *fit_options(one, trainer__callbacks=plot, **settings), processes=2)
        assert first.wait() != 0
        run_well(*fit_options(one, **settings), processes=processes)
        losses = scalars(one)["train/loss"]
        assert [step for step, _ in losses] == STEPS
        assert [value for _, value in losses] == pytest.approx(expected, rel=1e-4)


def test_elastic_nodes_leave_and_join(run_dir: str, tmp_path: Path) -> None:
    """Two torchrun agents as two nodes: one is killed, the other continues alone, a new one joins."""
    settings = {
        "model__backbone": "timm/test_vit",
        "model__optimizer": "{class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}",
        "data__image_size": 160,
        "trainer__max_epochs": 16,
    }
    without_faults = str(tmp_path / "whole")
    run_well(*fit_options(without_faults, **settings), processes=1)

    pace = "[{class_path: saboteur.Pace, init_args: {seconds: 0.15}}]"
    arguments = fit_options(run_dir, trainer__callbacks=pace, **settings)
    port = free_port()
    first = Job.node(tmp_path / "first", *arguments, port=port)
    wait_until_served(port)  # the node that is there first keeps the rendezvous
    second = Job.node(tmp_path / "second", *arguments, port=port)
    wait_for_start(run_dir, first, 2, 1)
    first.wait_for("epoch 2/")
    starts = len(worlds_of(run_dir))
    second.kill()
    wait_for_start(run_dir, first, 1, starts + 1)
    first.wait_for("epoch 4/")
    third = Job.node(tmp_path / "third", *arguments, port=port)
    assert first.wait() == 0, first.output
    third.wait()
    worlds = worlds_of(run_dir)
    assert 1 in worlds[worlds.index(2) :], worlds
    assert worlds[-1] == 2, worlds
    losses = scalars(run_dir)["train/loss"]
    expected = scalars(without_faults)["train/loss"]
    assert [step for step, _ in losses] == [step for step, _ in expected]
    assert [value for _, value in losses] == pytest.approx([value for _, value in expected], rel=1e-3, abs=1e-4)


def worlds_of(run_dir: str) -> list[int]:
    """Number of processes of each start."""
    return [start.world_size for start in accounting.read(run_dir)]


def wait_for_start(run_dir: str, job: Job, world_size: int, count: int) -> None:
    """Wait until at least ``count`` starts are recorded, the last with this many processes.

    A node that is slow to start joins later, and the other one begins alone.
    """
    deadline = time.monotonic() + 300
    while len(worlds := worlds_of(run_dir)) < count or worlds[-1] != world_size:
        assert job.process.poll() is None, job.output
        assert time.monotonic() < deadline, (worlds, job.output)
        time.sleep(0.1)
