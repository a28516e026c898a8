"""A rank as a process that is forked from one that has imported everything (torch elastic's ``start_method``)."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

from job.errors import EXIT_INTERNAL_ERROR, EXIT_USER_ERROR
from job.multiprocessing_internals import fork_fork_server
from job.process import signals, temporary
from job.process.ending import end_process
from job.process.parent_death import signal_at_parent_death

FORK_SERVER = "job.cluster.fork_server"
LOADER_FORK_SERVER = "job.data.fork_server"
NAME = "job rank"


class _Rank(NamedTuple):
    pid: int
    code: int


def start_fork_server(modules: list[str]) -> None:
    """Start the process that ranks are forked from, and let it import ``modules``.

    It returns at once. The server has the environment variables of this moment, and so have the ranks, besides those
    that torch elastic sets: what OpenMP reads when torch is imported must be set before.
    """
    # Its output goes where this process' goes, line by line with that of the others.
    os.environ["PYTHONUNBUFFERED"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload([FORK_SERVER, *modules])
    forkserver.ensure_running()


def run_rank(run: Callable[[list[str]], int], args: list[str], codes: str) -> None:
    """Run ``run(args)`` as a rank, and exit with the code that it returns.

    The process exits without the functions registered by :mod:`atexit`, as every child of multiprocessing: those of the
    server that it was forked from are among them. A run closes its files, uploads and threads before it returns, and
    temporary folders are removed here.

    Args:
        run: the command line, as a function that returns an exit code.
        args: its arguments.
        codes: folder with a file per rank of this node: its process ID and exit code.
    """
    # Before any thread starts; from here on the loader processes need no imports of their own.
    fork_fork_server([LOADER_FORK_SERVER])
    signals.end_at_once()
    # torch requests SIGINT, of which a second one ends a rank without saving.
    signal_at_parent_death(signal.SIGTERM)
    # Objects of the imports are never collected: a collection would write to their memory, and so copy it.
    gc.freeze()
    with contextlib.suppress(OSError):  # Linux: the name in top and ps; all ranks have the server's command line
        Path("/proc/self/comm").write_text(f"{NAME} {os.environ['RANK']}")
    _set_up_command(args)
    file = Path(codes) / os.environ["LOCAL_RANK"]
    _write(file, f"{os.getpid()} 0")
    code = run(args)
    signals.end_at_once(code)
    if code:
        _write(file, f"{os.getpid()} {code}")
        end_process(code)
    temporary.remove_all()


def run_check(check: Callable[..., int], args: list[str], writes: bool) -> None:
    """Run ``check(args)`` in this process, and exit with the code that it returns."""
    signals.end_at_once()
    signal_at_parent_death(signal.SIGTERM)
    _set_up_command(args)
    end_process(check(args, writes=writes))


def _set_up_command(args: list[str]) -> None:
    """Let ``sys.path`` and ``sys.argv`` be as ``python -m job`` has them."""
    if (folder := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # classes of the configuration may lie there
    sys.argv = ["job", *args]


def mistakes(codes: str) -> list[int]:
    """Exit codes for mistakes and unexpected exceptions of the ranks.

    torch elastic reports only the first rank that it finds to have ended, which may have ended because of another.
    """
    return [rank.code for rank in _ended(codes) if rank.code in (EXIT_USER_ERROR, EXIT_INTERNAL_ERROR)]


def end_ranks(codes: str, seconds: float) -> None:
    """Wait until all ranks of this node have exited, and kill those that have not after ``seconds``."""
    deadline = time.monotonic() + seconds
    while running := [rank.pid for rank in _ended(codes) if _is_rank(rank.pid)]:
        if time.monotonic() > deadline:
            for pid in running:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.1)


def _is_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith(NAME)
    return False


def _write(file: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk, or a folder that a cleaner of temporary files has deleted
        file.write_text(text)


def _ended(codes: str) -> list[_Rank]:
    """All ranks that have started on this node; their code is 0 while they run, or if they were killed."""
    ranks = []
    with contextlib.suppress(OSError):
        for file in Path(codes).iterdir():
            if len(words := file.read_text().split()) == 2:
                ranks.append(_Rank(*map(int, words)))
    return ranks
