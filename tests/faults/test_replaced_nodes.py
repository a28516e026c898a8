"""Nodes that are replaced while the launchers of the others stay: two launchers on this machine, with one rank each."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from harness import Job, fit_options
from support import assert_same_weights, run_well, scalars

from job.demo.gcs_server import free_port
from job.monitoring import accounting

pytestmark = pytest.mark.integration

EPOCHS = 16
PACE = "[{class_path: saboteur.Pace, init_args: {seconds: 0.08}}]"


class Nodes:
    """Two launchers, and the logs of all that have been.

    Args:
        folder: for the logs.
        arguments: a command and its options.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.arguments, self.port = folder, arguments, free_port()
        self.starts = [0, 0]
        self.jobs = [self.start(0), self.start(1)]

    def start(self, rank: int) -> Job:
        self.starts[rank] += 1
        variables = {
            "JOB_COMPLETION_INDEX": str(rank),
            "LAUNCH_NODES": "2",
            "LAUNCH_COORDINATOR": f"localhost:{self.port}",
        }
        return Job(self.folder / f"log-{rank}-{self.starts[rank]}", "launch", *self.arguments, **variables)

    @property
    def epochs(self) -> int:
        """Number of epochs of which the end has been logged, in all rounds."""
        return sum(file.read_text().count(f"/{EPOCHS}  step") for file in self.folder.glob("log-0-*"))

    def wait_for_epoch(self) -> None:
        before, deadline = self.epochs, time.monotonic() + 90
        while self.epochs == before:
            assert time.monotonic() < deadline, self.output
            assert all(job.process.poll() is None for job in self.jobs), self.output
            time.sleep(0.05)

    def replace(self, rank: int, number: int) -> float:
        """End a node as a preemption does, start its successor, and return the seconds until both train again."""
        if number == signal.SIGKILL:
            self.jobs[rank].kill()
        else:
            self.jobs[rank].process.send_signal(number)
            assert self.jobs[rank].wait() == 128 + number, self.output
        begun = time.monotonic()
        self.jobs[rank] = self.start(rank)
        log = self.jobs[0].log if rank else self.folder / f"log-0-{self.starts[0]}"
        resumed = 0 if rank == 0 else self.jobs[0].output.count("resuming after step")
        while log.read_text().count("resuming after step") == resumed:
            assert time.monotonic() < begun + 90, self.output
            time.sleep(0.05)
        return time.monotonic() - begun

    @property
    def output(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted(self.folder.glob("log-*")))


def test_nodes_that_are_replaced(tmp_path: Path) -> None:
    """Preempted and lost by turns; the launcher of the other node stays, and no step is lost or repeated."""
    whole, run_dir = str(tmp_path / "whole"), str(tmp_path / "run")
    run_well(*fit_options(whole, trainer__max_epochs=EPOCHS), processes=2)
    settings = {"trainer__max_epochs": EPOCHS, "trainer__callbacks": PACE, "checkpoint__every_n_steps": 2}
    nodes = Nodes(tmp_path, *fit_options(run_dir, **settings))
    seconds = []
    for replaced, times in ((1, 10), (0, 2)):
        survivor = nodes.jobs[1 - replaced].process.pid
        for count in range(times):
            nodes.wait_for_epoch()
            seconds.append(nodes.replace(replaced, signal.SIGKILL if count % 2 else signal.SIGTERM))
        assert nodes.jobs[1 - replaced].process.pid == survivor
    print("seconds until both nodes train again:", [round(value, 1) for value in seconds])
    codes = [job.wait() for job in nodes.jobs]
    assert codes == [0, 0], nodes.output
    assert max(seconds) < 30, seconds
    assert len(accounting.read(run_dir)) == len(seconds) + 1
    assert scalars(run_dir)["train/loss"] == scalars(whole)["train/loss"]
    assert_same_weights(run_dir, whole)
