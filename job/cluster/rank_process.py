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

from job.errors import EXIT_HANGUP, EXIT_INTERNAL_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR
from job.multiprocessing_internals import fork_fork_server
from job.process import signals, temporary
from job.process.ending import end_process
from job.process.parent_death import signal_at_parent_death

FORK_SERVER = "job.cluster.fork_server"
LOADER_FORK_SERVER = "job.data.fork_server"
NAME = "job rank"
_STOPPED = (EXIT_PREEMPTED, EXIT_INTERRUPTED, EXIT_HANGUP)


class _Rank(NamedTuple):
    restart: int
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
        codes: folder with a file per restart and rank of this node: its process ID and exit code.
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
    if (folder := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # as python -m has it: classes of the configuration may lie there
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    file = Path(codes) / f"{restart}-{os.environ['LOCAL_RANK']}"
    _write(file, f"{os.getpid()} 0")
    sys.argv = ["job", *args]
    code = _final_code(codes, restart) or run(args)
    signals.end_at_once(code)
    if code:
        _write(file, f"{os.getpid()} {code}")
        end_process(code)
    temporary.remove_all()


def run_check(check: Callable[..., int], args: list[str], writes: bool) -> None:
    """Run ``check(args)`` in this process, and exit with the code that it returns."""
    signals.end_at_once()
    signal_at_parent_death(signal.SIGTERM)
    if (folder := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    sys.argv = ["job", *args]
    end_process(check(args, writes=writes))


def _final_code(codes: str, restart: int) -> int:
    """The exit code of earlier ranks of this node, if another attempt is no use; otherwise 0.

    torch elastic restarts after any failure. A user's mistake has been reported and would be repeated, and a stop on
    request, in which all ranks exit with the code of a signal, is to last.
    """
    ended = [rank for rank in _ended(codes) if rank.restart < restart]
    if any(rank.code == EXIT_USER_ERROR for rank in ended):
        return EXIT_USER_ERROR
    last = [rank.code for rank in ended if rank.restart == restart - 1]
    return last[0] if last and all(code in _STOPPED for code in last) else 0


def mistakes(codes: str) -> list[int]:
    """Exit codes for mistakes and unexpected exceptions of the ranks of the last restart.

    torch elastic reports only the first rank that it finds to have ended, which may have ended because of another.
    """
    ended = _ended(codes)
    last = max((rank.restart for rank in ended), default=0)
    return [r.code for r in ended if r.restart == last and r.code in (EXIT_USER_ERROR, EXIT_INTERNAL_ERROR)]


def end_ranks(codes: str, seconds: float) -> None:
    """Wait until all ranks of this node have exited, and kill those that have not after ``seconds``.

    For ranks whose fork server has ended: torch elastic takes them for ended, too.
    """
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
                ranks.append(_Rank(int(file.name.partition("-")[0]), *map(int, words)))
    return ranks
