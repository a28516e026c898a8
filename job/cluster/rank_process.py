"""A rank as a process that is forked from one that has imported everything (torch elastic's ``start_method``)."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

from job.errors import EXIT_INTERNAL_ERROR, EXIT_USER_ERROR
from job.process import signals
from job.process.ending import end_process

FORK_SERVER = "job.cluster.fork_server"


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
    """Run ``run(args)`` as a rank, and end the process with the code that it returns.

    Args:
        run: the command line, as a function that returns an exit code.
        args: its arguments.
        codes: folder of the exit codes of this node's ranks, one file per restart and rank.
    """
    signals.end_at_once()
    # Objects of the imports are never collected: a collection would write to their memory, and so copy it.
    gc.freeze()
    with contextlib.suppress(OSError):  # Linux: the name in top and ps; all ranks have the server's command line
        Path("/proc/self/comm").write_text(f"job rank {os.environ['RANK']}")
    file = Path(codes) / f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}"
    with contextlib.suppress(OSError):
        file.touch()
    sys.argv = ["job", *args]
    # torch elastic restarts after any failure, but a user's mistake has been reported and is not mended by a restart.
    is_futile = any(code == EXIT_USER_ERROR for _, code in _exit_codes(codes))
    code = EXIT_USER_ERROR if is_futile else run(args)
    signals.end_at_once(code)
    if code:
        with contextlib.suppress(OSError):  # a full disk
            file.write_text(str(code))
        end_process(code)


def mistakes(codes: str) -> list[int]:
    """Exit codes that say what was wrong, of the ranks of the last restart.

    torch elastic reports the first rank that it finds to have ended, which may be one that missed another.
    """
    ended = _exit_codes(codes)
    last = max((restart for restart, _ in ended), default=0)
    return [code for restart, code in ended if restart == last and code in (EXIT_USER_ERROR, EXIT_INTERNAL_ERROR)]


def _exit_codes(codes: str) -> list[tuple[int, int]]:
    """Restart and exit code of each rank that has started on this node; 0 for those that run or were killed."""
    return [(int(file.name.partition("-")[0]), int(file.read_text() or 0)) for file in Path(codes).iterdir()]
