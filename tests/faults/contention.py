"""Several processes contend for the lease of one run_dir while its holder is stopped and resumed.

By hand, on a GCS server and on a disk: ``python tests/faults/contention.py ROUNDS``.
"""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from support import environment

from job import storage
from job.demo.gcs_server import create_bucket, gcs_server


@dataclass
class Outcome:
    """Counts from the logs of all processes.

    Attributes:
        takeovers: how often a lease passed from one process to another.
        writes: how many writes there were.
        late: writes that were allowed after another process had the lease: there must be none.
        in_flight: writes that were allowed before, and answered after: the process was stopped in between.
        blocked: on a disk, how often the holder was stopped while it had locked the lease's file.
        arrived: those of them that the store received after another process had the lease.
    """

    takeovers: int
    writes: int
    late: int = 0
    in_flight: int = 0
    arrived: int = 0
    blocked: int = 0


def contend(run_dir: str, folder: Path, rounds: int, *, processes: int = 3, seconds: float = 1.0) -> Outcome:
    """Stop and resume the holder of the lease, ``rounds`` times, and go on until there are a few writes per round."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"p{number}" for number in range(processes)]
    logs = {name: folder / f"{name}.log" for name in names}
    contender = str(Path(__file__).parent / "contender.py")
    running = {
        name: subprocess.Popen(
            [sys.executable, contender, run_dir, name, str(logs[name]), str(seconds)],
            env=environment(),
            stderr=(folder / f"{name}.err").open("ab"),
        )
        for name in names
    }
    blocked = 0
    dice = random.Random(rounds)
    try:
        for _ in range(rounds):
            holder = _next_holder(logs, running)
            time.sleep(dice.uniform(0, seconds / 2))
            running[holder].send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            while _newest_holder(logs) == holder:
                waited = time.monotonic() - stopped
                if waited > 10 * seconds and _holds_a_lock(running[holder].pid):
                    blocked += 1
                    break
                assert waited < 300, "nobody takes the lease over"
                time.sleep(0.02)
            time.sleep(dice.uniform(0, seconds / 2))
            running[holder].send_signal(signal.SIGCONT)
        time.sleep(2 * seconds)
        deadline = time.monotonic() + 300
        while sum(event[0] == "wrote" for log in logs.values() for event in _events(log)) <= 7 * rounds:
            assert time.monotonic() < deadline, "few writes"
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return replace(_evaluate(run_dir, logs), blocked=blocked)


def _holds_a_lock(pid: int) -> bool:
    return any(line.split()[4] == str(pid) for line in Path("/proc/locks").read_text().splitlines())


def _events(log: Path) -> list[tuple[str, list[float]]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [(line.split()[0], [float(word) for word in line.split()[1:]]) for line in lines]


def _newest_holder(logs: dict[str, Path]) -> str | None:
    acquired = [(e[1][0], name) for name, log in logs.items() for e in _events(log) if e[0] == "acquired"]
    return max(acquired)[1] if acquired else None


def _next_holder(logs: dict[str, Path], running: dict[str, subprocess.Popen[bytes]]) -> str:
    """Wait until the newest holder has written."""
    deadline = time.monotonic() + 300
    while True:
        assert time.monotonic() < deadline, "nobody holds the lease"
        assert all(process.poll() is None for process in running.values())
        holder = _newest_holder(logs)
        if holder is not None and _events(logs[holder])[-1][0] == "wrote":
            return holder
        time.sleep(0.02)


def _evaluate(run_dir: str, logs: dict[str, Path]) -> Outcome:
    acquired = sorted((e[1][0], name) for name, log in logs.items() for e in _events(log) if e[0] == "acquired")
    outcome = Outcome(sum(a[1] != b[1] for a, b in itertools.pairwise(acquired)), 0)
    for name, log in logs.items():
        acquired_at = None
        for kind, times in _events(log):
            if kind == "acquired":
                acquired_at = times[0]
            elif kind == "wrote":
                assert acquired_at is not None
                outcome.writes += 1
                # The first other process that acquired the lease since this one did.
                end = min((at for at, other in acquired if at > acquired_at and other != name), default=float("inf"))
                outcome.late += times[0] > end
                if times[0] <= end < times[1]:
                    outcome.in_flight += 1
                    outcome.arrived += _stored_at(f"{run_dir}/{name}-{times[2]:.0f}") > end
    return outcome


def _stored_at(uri: str) -> float:
    if storage.is_local(uri):
        return Path(uri).stat().st_ctime
    return datetime.fromisoformat(storage.info(uri)["timeCreated"]).timestamp()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, gcs_server(Path(scratch) / "buckets"):
        create_bucket("gs://tests")
        for place in ("gs://tests/run", f"{scratch}/run"):
            began = time.monotonic()
            totals = contend(place, Path(scratch) / f"logs{len(place)}", int(sys.argv[1]))
            print(f"{place}: {totals}, {time.monotonic() - began:.0f} s", flush=True)
