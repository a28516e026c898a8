"""Two real fits of one run_dir, of which the first is stopped at a random moment and resumed: ROUNDS times, by hand.

``python tests/faults/contending_fits.py ROUNDS``: both are forked from this process, which has imported everything.
"""

from __future__ import annotations

import collections
import functools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import SETTINGS
from support import options, picture_files

from job import checkpoint, cli, storage
from job.demo.gcs_server import create_bucket, gcs_server
from job.resilience.lease import Lease
from job.train import fit

SECONDS = 1.5
"""Lifetime of a lease."""


def main(rounds: int) -> None:
    random.seed(rounds)
    with tempfile.TemporaryDirectory() as scratch, gcs_server(Path(scratch) / "buckets"):
        _in_child(_prepare, Path(scratch) / "prepare")
        counts: collections.Counter[str] = collections.Counter()
        for number in range(rounds):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            run_dir = f"gs://tests/{number}" if number % 5 else f"{folder}/run"
            result = _contend(run_dir, folder)
            counts.update(result)
            print(number, run_dir, result, flush=True)
        print(dict(counts))


def _prepare() -> None:
    create_bucket("gs://tests")
    storage.write_many("gs://tests/colours", picture_files(["blue", "red"], 20))


def _contend(run_dir: str, folder: Path) -> dict[str, int]:
    first = _fit(run_dir, folder / "first")
    assert _has_acquired(folder / "first.events", first), (folder / "first.log").read_text()
    time.sleep(random.uniform(0, 4.0))
    os.kill(first, signal.SIGSTOP)
    second = _fit(run_dir, folder / "second")
    if not _has_acquired(folder / "second.events", second):
        # On a disk, the first was stopped while it had locked the lease's file: the second ends with 75.
        os.kill(first, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        assert "has held the lock" in (folder / "second.log").read_text()
        return {"rounds": 1, "blocked": 1, f"code {code} after a block": 1}
    time.sleep(random.uniform(0, 3.0))
    os.kill(first, signal.SIGCONT)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (first, second)]
    events = {name: _events(folder / f"{name}.events") for name in ("first", "second")}
    taken = next(float(e[1]) for e in events["second"] if e[0] == "acquired")
    result = {"rounds": 1, f"codes {codes[0]} {codes[1]}": 1, "late": 0, "unchecked": 0, "in flight": 0, "arrived": 0}
    for kind, *fields in events["first"]:
        if kind == "wrote":
            allowed, answered, uri = float(fields[0]), float(fields[1]), " ".join(fields[2:])
            result["writes of the first"] = result.get("writes of the first", 0) + 1
            if answered > taken and allowed == 0:
                result["unchecked"] += 1
                print("unchecked:", uri)
            elif allowed > taken:
                result["late"] += 1
                print("late:", uri)
            elif answered > taken:
                result["in flight"] += 1
                result["arrived"] += _in_child_float(functools.partial(_stored_at, uri), folder / "stored") > taken
    problem = _in_child(functools.partial(_check, run_dir), folder / "check")
    result["bad runs"] = int(problem != 0)
    if problem or codes not in ([2, 0], [0, 0]):
        print((folder / "first.log").read_text(), (folder / "second.log").read_text(), (folder / "check").read_text())
    return result


def _fit(run_dir: str, path: Path) -> int:
    pace = "[{class_path: saboteur.Pace, init_args: {seconds: 0.1}}]"
    arguments = options(SETTINGS, data__root="gs://tests/colours", run_dir=run_dir, trainer__callbacks=pace)

    def run() -> None:
        _record(path.with_suffix(".events"))
        fit.Lease = functools.partial(Lease, seconds=SECONDS)  # type: ignore[assignment,misc]
        cli.main(["fit", *arguments])

    return _fork(run, path.with_suffix(".log"))


def _record(path: Path) -> None:
    """Log when the lease is acquired, and each write: when the lease allowed it, and when it was answered."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    state = threading.local()

    def note(*fields: object) -> None:
        os.write(descriptor, (" ".join(map(str, fields)) + "\n").encode())

    acquire, require_held = Lease.acquire, Lease.require_held

    def acquire_and_note(self: Lease) -> None:
        acquire(self)
        note("acquired", time.time())

    def require_and_note(self: Lease) -> None:
        require_held(self)
        state.allowed = time.time()

    Lease.acquire, Lease.require_held = acquire_and_note, require_and_note  # type: ignore[method-assign]

    def recorded(function: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if not str(args[position]).endswith("lease.json"):
                note("wrote", getattr(state, "allowed", 0), time.time(), args[position])
            state.allowed = 0
            return result

        return call

    for name, position in (("write_bytes", 0), ("upload", 1)):
        setattr(storage, name, recorded(getattr(storage, name), position))


def _check(run_dir: str) -> None:
    """Assert that the run is complete and its checkpoints are intact."""
    manifests = checkpoint.manifests(run_dir)
    assert manifests[-1].global_step == 24, manifests
    for manifest in manifests:
        checkpoint.verify(run_dir, manifest)
    assert not storage.exists(f"{run_dir}/lease.json")


def _stored_at(uri: str) -> float:
    if storage.is_local(uri):
        return Path(uri).stat().st_ctime
    return datetime.fromisoformat(storage.info(uri)["updated"]).timestamp()


def _fork(function: Callable[[], None], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        function()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _in_child(function: Callable[[], None], log: Path) -> int:
    """Run the function in a forked process, since fsspec's connections do not survive a fork."""
    return os.waitstatus_to_exitcode(os.waitpid(_fork(function, log), 0)[1])


def _in_child_float(function: Callable[[], float], path: Path) -> float:
    """Return the function's result; 0 if it fails, as for an object that the second fit has deleted since."""
    if _in_child(lambda: print(function()), path):
        return 0.0
    return float(path.read_text().splitlines()[-1])


def _events(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def _has_acquired(path: Path, pid: int) -> bool:
    """Wait until a fit holds the lease; False if it has ended without."""
    while not any(event[0] == "acquired" for event in _events(path)):
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.02)
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]))
