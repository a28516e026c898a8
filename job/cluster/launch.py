"""Launch the ranks of this node by torch's elastic agent: the entry point of a container."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from job.cluster.environment import Node, find_node, ignored_variables
from job.cluster.outcomes import FAILED, FINISHED, LOST, REPLACED
from job.cluster.rank_process import end_ranks, mistakes, run_check, run_rank, start_fork_server
from job.errors import (
    EXIT_HANGUP,
    EXIT_INTERNAL_ERROR,
    EXIT_INTERRUPTED,
    EXIT_NODES_MISSING,
    EXIT_PREEMPTED,
    EXIT_RETRY,
    EXIT_USER_ERROR,
    first_line,
)
from job.process import signals, temporary
from job.process.cpus import available_cpus
from job.process.descendants import kill_descendants

if TYPE_CHECKING:
    from job.cluster.rounds import Round, Rounds

log = logging.getLogger(__name__)

SIGNAL_EXIT_BASE = 128
FORK_SERVER_LOST = 255
"""Exit code that multiprocessing reports of a process whose fork server has ended."""
STOP_SECONDS = 30
"""Seconds that ranks have to save their state after a signal, and to end when those of another node have ended."""
REPLACED_SECONDS = 10
"""Seconds that ranks have to end when another node is there for the second time: its first launcher had all of its own.
"""
_LOCAL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
"""Of this machine, whatever happens to others."""
_OVER = {
    FAILED: "the ranks of another node ended",
    REPLACED: "another node was replaced",
    LOST: "node 0 was lost",
}


def launch(
    args: list[str], run: Callable[[list[str]], int], modules: list[str], check: Callable[..., int] | None = None
) -> int:
    """Run ``run(args)`` in as many processes as this node should have; returns the exit code.

    The ranks are forked from one process that has imported ``modules`` and touched no device: eight ranks import once,
    and ranks that are started again do not import at all. Where torch-xla is installed,
    which starts threads when it is imported, a rank is a new process, ``python -m job``.

    The exit code is the ranks' own, where torchrun's would be 1: that of a user's mistake (2) before that of a stop on
    request (130, 129, 143), of an unexpected exception (70) and of what a restart may mend (75). After a signal torch
    elastic gives the ranks 30 s to save.

    On several nodes the command is checked first: a mistake ends each node at once, though others are missing. Then
    they wait for one another, without limit unless ``LAUNCH_WAIT_SECONDS`` is set. When another node was replaced, the
    ranks of this node are started again, as often as that happens (:mod:`job.cluster.rounds`); and when none was, up to
    ``LAUNCH_RESTARTS`` times.

    Args:
        args: a command of ``python -m job`` with its options.
        run: the command line as a function, by a name that can be imported.
        modules: modules that the command needs.
        check: checks ``args`` and returns an exit code, by a name that can be imported; with ``writes=True`` also that
            it may write its results.

    Raises:
        ConfigError: the environment is not understood.
        NodesMissing: other nodes are missing after ``LAUNCH_WAIT_SECONDS``.
        RankLost: on node 0, another process uses the port of the store.
    """
    node = find_node(os.environ)
    log.setLevel(logging.INFO)  # where RANK counts nodes, all but the first would be silent
    log.info("%s", node)
    if node.platform == "torchrun worker":
        return run(args)
    if ignored := ignored_variables(os.environ):
        log.warning("%s: not used; the launcher reads only the variables in launch --help", ", ".join(ignored))
    processes = node.processes or _gpus() or 1
    # torch elastic would leave all cores to each rank.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cpus() // processes, 1)))
    forks = find_spec("torch_xla") is None
    if forks:
        start_fork_server(modules)
        # Not in the ranks: torch prints the stack of each request that a lost store does not answer.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    checking = _start_check(check, args, node, forks=forks) if node.nodes > 1 and check is not None else None
    with signals.ending_at_once():  # C code that imports a module may turn the exception of a signal into another one
        # Imported while the server imports.
        from torch.distributed.elastic.multiprocessing.api import SignalException

        from job.cluster.agent import quieten_torch
        from job.cluster.rounds import Rounds

    if checking is not None:
        checking.join()
        if checking.exitcode == EXIT_USER_ERROR:
            return EXIT_USER_ERROR
    quieten_torch()
    rounds = Rounds(node, in_place=forks and node.platform != "TPU")  # a lost host takes its slice with it
    try:
        code = 0
        while True:
            current = rounds.gather(code)
            if isinstance(current, int):
                return current
            log.info("torch elastic starts %s", "1 process" if processes == 1 else f"{processes} processes")
            code = _run_round(node, rounds, current, processes, run if forks else None, args)
            if (final := rounds.end(current, code)) is not None:
                return final
            log.info("the ranks of this node ended with code %d; it waits for the others", code)
    except SignalException as error:
        _ignore_signals()
        return 0 if rounds.may_leave() else SIGNAL_EXIT_BASE + int(error.sigval)
    finally:
        _ignore_signals()


def _ignore_signals() -> None:
    """From here on torch's handlers would raise an exception that nobody expects."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def _run_round(
    node: Node,
    rounds: Rounds,
    current: Round,
    processes: int,
    run: Callable[[list[str]], int] | None,
    args: list[str],
) -> int:
    """Run the ranks of this node once; returns its exit code.

    Args:
        node: this node.
        rounds: all rounds.
        current: this one.
        processes: number of ranks.
        run: the command line as a function; None: run a new interpreter.
        args: a command of ``python -m job`` with its options.
    """
    from job.cluster.agent import run_ranks

    folder = temporary.folder("launch")
    codes = str(folder / "codes")
    Path(codes).mkdir()
    stop = threading.Event()
    if node.nodes > 1:
        end = (lambda: end_ranks(codes, 0)) if run is not None else kill_descendants
        threading.Thread(target=_end_with_others, args=(rounds, current, end, stop), daemon=True).start()
    try:
        if run is not None:
            failed = run_ranks(node, current, processes, run_rank, (run, args, codes), folder / "torch")
        else:
            failed = run_ranks(node, current, processes, sys.executable, ("-u", "-m", "job", *args), folder / "torch")
        if FORK_SERVER_LOST in failed:
            end_ranks(codes, STOP_SECONDS)
        return exit_code(failed, mistakes(codes)) if failed else 0
    except (OSError, RuntimeError) as error:
        if node.nodes == 1 or getattr(error, "errno", None) in _LOCAL_ERRORS:
            raise
        log.error("other nodes of %d were lost while the ranks started (%s)", node.nodes, first_line(error, 200))
        return EXIT_NODES_MISSING
    finally:
        stop.set()
        temporary.remove(folder)


def _end_with_others(rounds: Rounds, current: Round, end: Callable[[], None], stop: threading.Event) -> None:
    """In a thread: kill ranks that do not end after those of another node, because they hang, say."""
    over = rounds.wait_for_end(current, stop)
    if over and over != FINISHED:
        log.info("%s, so those of this node end", _OVER.get(over, "the round is over"))
        if not stop.wait(REPLACED_SECONDS if over == REPLACED else STOP_SECONDS):
            end()


def _start_check(check: Callable[..., int], args: list[str], node: Node, *, forks: bool) -> BaseProcess:
    """Start ``check(args)`` in a process of its own, as :func:`launch` starts the ranks."""
    context = multiprocessing.get_context("forkserver") if forks else multiprocessing.get_context("spawn")
    # Ended with this process, should a signal stop it first.
    process = context.Process(target=run_check, args=(check, args, node.node_rank == 0), daemon=True)
    process.start()
    return process


def _gpus() -> int:
    with signals.ending_at_once():
        import torch

    return torch.cuda.device_count()


def exit_code(codes: list[int], mistakes: Sequence[int] = ()) -> int:
    """Choose the exit code of this node.

    Args:
        codes: of the ranks that torch elastic reports; minus the number of the signal, if one killed the rank.
        mistakes: of other ranks: 2, or 70, which may be a consequence of the death of another rank.
    """
    killed = any(code < 0 or code == FORK_SERVER_LOST for code in codes)
    codes = [*codes, *(code for code in mistakes if code == EXIT_USER_ERROR or not killed)]
    order = (
        EXIT_USER_ERROR,
        EXIT_INTERRUPTED,
        EXIT_HANGUP,
        EXIT_PREEMPTED,
        EXIT_INTERNAL_ERROR,
        EXIT_RETRY,
    )
    for code in order:
        if code in codes:
            return code
    return EXIT_RETRY if killed else EXIT_INTERNAL_ERROR
