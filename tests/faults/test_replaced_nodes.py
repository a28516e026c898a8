"""Nodes that are replaced while the launchers of the others stay: two launchers on this machine, with one rank each."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from harness import Job, descendants, fit_options
from support import assert_same_weights, free_port, run_well, scalars

from job.monitoring import accounting

pytestmark = pytest.mark.integration

EPOCHS = 14
NO_WATCHDOG = {"watchdog__min_seconds": 1200}
"""The launchers, not the watchdog, end ranks that wait for others."""
PACE = "[{class_path: saboteur.Pace, init_args: {seconds: 0.08}}]"


class Nodes:
    """Two launchers, and the logs of all that have been; none is left when a test ends.

    Args:
        folder: for the logs.
        arguments: a command and its options.
        settings: environment variables of the first two.
    """

    def __init__(self, folder: Path, *arguments: str, **settings: str) -> None:
        self.folder, self.arguments, self.port = folder, arguments, free_port()
        self.starts, self.all = [0, 0], list[Job]()
        self.jobs = [self.start(0, **settings), self.start(1, **settings)]

    def start(self, rank: int, **settings: str) -> Job:
        self.starts[rank] += 1
        variables = {
            **settings,
            "JOB_COMPLETION_INDEX": str(rank),
            "LAUNCH_NODES": "2",
            "LAUNCH_COORDINATOR": f"localhost:{self.port}",
        }
        self.all.append(Job(self.folder / f"log-{rank}-{self.starts[rank]}", "launch", *self.arguments, **variables))
        return self.all[-1]

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.all:
            if job.process.poll() is None:
                job.kill()

    @property
    def epochs(self) -> int:
        """Number of epochs of which the end has been logged, in all rounds."""
        return sum(file.read_text().count(f"/{EPOCHS}  step") for file in self.folder.glob("log-0-*"))

    def wait_for_epoch(self) -> None:
        before, deadline = self.epochs, time.monotonic() + 300
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
        resumed = 0 if rank == 0 else self.jobs[0].output.count("resuming after step")
        self.jobs[rank] = self.start(rank)
        log = self.jobs[0].log if rank else self.folder / f"log-0-{self.starts[0]}"
        while log.read_text().count("resuming after step") == resumed:
            assert time.monotonic() < begun + 300, self.output
            time.sleep(0.05)
        return time.monotonic() - begun

    @property
    def output(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted(self.folder.glob("log-*")))


def test_nodes_that_are_replaced(tmp_path: Path) -> None:
    """Preempted and lost by turns; the launcher of the other node stays, and no step is lost or repeated."""
    whole, run_dir = str(tmp_path / "whole"), str(tmp_path / "run")
    run_well(*fit_options(whole, trainer__max_epochs=EPOCHS), processes=2)
    settings = {
        "trainer__max_epochs": EPOCHS,
        "trainer__callbacks": PACE,
        "checkpoint__every_n_steps": 2,
        **NO_WATCHDOG,
    }
    with Nodes(tmp_path, *fit_options(run_dir, **settings)) as nodes:
        seconds = []
        for replaced, times in ((1, 6), (0, 2)):
            survivor = nodes.jobs[1 - replaced].process.pid
            for count in range(times):
                nodes.wait_for_epoch()
                seconds.append(nodes.replace(replaced, signal.SIGKILL if count % 2 else signal.SIGTERM))
            assert nodes.jobs[1 - replaced].process.pid == survivor
        print("seconds until both nodes train again:", [round(value, 1) for value in seconds])
        codes = [job.wait() for job in nodes.jobs]
        assert codes == [0, 0], nodes.output
        assert max(seconds) < 120, seconds  # a limit of torch or of the watchdog is longer
        assert len(accounting.read(run_dir)) == len(seconds) + 1
        assert scalars(run_dir)["train/loss"] == scalars(whole)["train/loss"]
        assert_same_weights(run_dir, whole)


def test_ranks_that_hang_are_killed_when_the_other_node_is_replaced(tmp_path: Path) -> None:
    settings = {"trainer__max_epochs": EPOCHS, "trainer__callbacks": PACE, **NO_WATCHDOG}
    with Nodes(tmp_path, *fit_options(str(tmp_path / "run"), **settings)) as nodes:
        nodes.wait_for_epoch()
        os.kill(rank_of(nodes.jobs[0]), signal.SIGSTOP)
        nodes.replace(1, signal.SIGKILL)
        assert "another node was replaced, so those of this node end" in nodes.output
        for job in nodes.jobs:
            job.process.send_signal(signal.SIGTERM)
        assert [job.wait() for job in nodes.jobs] == [143, 143], nodes.output


def test_a_mistake_on_one_node_ends_both(tmp_path: Path) -> None:
    mistake = "[{class_path: saboteur.Mistake, init_args: {rank: 1}}]"
    with Nodes(tmp_path, *fit_options(str(tmp_path / "run"), trainer__callbacks=mistake)) as nodes:
        assert [job.wait() for job in nodes.jobs] == [2, 2], nodes.output
        assert nodes.output.count("the disk of this node is too small") == 1
        assert "the ranks of node 1 ended because of a mistake" in nodes.jobs[0].output


@pytest.mark.parametrize(("settings", "code"), [({}, 143), ({"LAUNCH_WAIT_SECONDS": "3"}, 69)])
def test_the_wait_for_a_successor_ends(settings: dict[str, str], code: int, tmp_path: Path) -> None:
    """By a signal, or after a limit."""
    arguments = fit_options(str(tmp_path / "run"), trainer__max_epochs=EPOCHS, trainer__callbacks=PACE)
    with Nodes(tmp_path, *arguments, **settings) as nodes:
        nodes.wait_for_epoch()
        nodes.jobs[1].kill()
        nodes.jobs[0].wait_for("ended with code 75")
        if code == 143:
            time.sleep(1)
            nodes.jobs[0].process.send_signal(signal.SIGTERM)
        assert nodes.jobs[0].wait() == code, nodes.output
        assert "Traceback" not in nodes.output


def rank_of(job: Job) -> int:
    """The process of the only rank of a launcher."""
    names: dict[int, str] = {}
    for pid in descendants(job.process.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names[pid] = Path(f"/proc/{pid}/comm").read_text()
    (rank,) = (pid for pid, name in names.items() if name.startswith("job rank "))
    return rank
