"""Contract of job.multiprocessing_internals with the private API of multiprocessing."""

from __future__ import annotations

import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from support import REPOSITORY, environment, is_running

from job.multiprocessing_internals import fork_fork_server

SCRIPT = """
import multiprocessing, os, signal, sys
from job.multiprocessing_internals import fork_fork_server

def where(queue):
    queue.put((os.getppid(), "of_the_parent" in sys.modules, "colorsys" in sys.modules, os.environ.get("RANK"),
        signal.getsignal(signal.SIGTERM) == signal.SIG_DFL))

if __name__ == "__main__":
    sys.modules["of_the_parent"] = sys
    os.environ["RANK"] = "3"
    signal.signal(signal.SIGTERM, lambda *_: None)
    fork_fork_server(["colorsys"])
    context = multiprocessing.get_context("forkserver")
    queue = context.SimpleQueue()
    for _ in range(2):
        process = context.Process(target=where, args=(queue,))
        process.start()
        print(*queue.get(), flush=True)
        process.join()
        assert process.exitcode == 0
"""


def test_children_come_from_a_fork_of_this_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment(), cwd=REPOSITORY, timeout=300
    )
    assert result.returncode == 0, result.stderr
    servers = {int(line.split()[0]) for line in result.stdout.splitlines()}
    assert len(servers) == 1, "each child had another server"
    assert [line.split()[1:] for line in result.stdout.splitlines()] == [["True", "True", "3", "True"]] * 2
    deadline = time.monotonic() + 60
    while is_running(server := servers.copy().pop()):
        assert time.monotonic() < deadline, f"the server {server} outlives its clients"
        time.sleep(0.05)


def test_a_python_whose_fork_servers_want_a_key_starts_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    before = dict(vars(forkserver._forkserver))  # type: ignore[attr-defined]
    fork_fork_server([])
    assert vars(forkserver._forkserver) == before  # type: ignore[attr-defined]
