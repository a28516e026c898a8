"""Launch the ranks of this node by torch's elastic agent: the entry point of a container."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from typing import Any

from job.cluster import ranks
from job.cluster.environment import Node, find_node, ignored_variables
from job.cluster.rank_process import end_ranks, mistakes, run_check, run_rank, start_fork_server
from job.errors import (
    EXIT_HANGUP,
    EXIT_INTERNAL_ERROR,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_RETRY,
    EXIT_USER_ERROR,
    NodesMissing,
)
from job.process import signals, temporary
from job.process.cpus import available_cpus
from job.process.ending import end_process

log = logging.getLogger(__name__)

JOIN_SECONDS = 600
"""Limit of torch's rendezvous, which begins when all nodes are there, and of that after a restart of the ranks."""
SIGNAL_EXIT_BASE = 128
FORK_SERVER_LOST = 255
"""Exit code that multiprocessing reports of a process whose fork server has ended."""
STOP_SECONDS = 30.0
"""Seconds that ranks have to save their state; torch elastic gives them as many."""


def launch(
    args: list[str], run: Callable[[list[str]], int], modules: list[str], check: Callable[..., int] | None = None
) -> int:
    """Run ``run(args)`` in as many processes as this node should have; returns the exit code.

    The ranks are forked from one process that has imported ``modules`` and touched no device: eight ranks import once,
    and ranks that torch elastic restarts (``LAUNCH_RESTARTS``) do not import at all. Where torch-xla is installed,
    which starts threads when it is imported, a rank is a new process, ``python -m job``.

    The exit code is the ranks' own, where torchrun's would be 1: that of a user's mistake (2) before that of a stop on
    request (130, 129, 143), of an unexpected exception (70) and of what a restart may mend (75). After a signal torch
    elastic gives the ranks 30 s to save.

    On several nodes the command is checked first: a mistake ends each node at once, though others are missing. Then
    they wait for one another, without limit unless ``LAUNCH_WAIT_SECONDS`` is set.

    Args:
        args: a command of ``python -m job`` with its options.
        run: the command line as a function, by a name that can be imported.
        modules: modules that the command needs.
        check: checks ``args`` and returns an exit code, by a name that can be imported; with ``writes=True`` also that
            it may write its results.

    Raises:
        ConfigError: the environment is not understood.
        NodesMissing: other nodes are missing after ``LAUNCH_WAIT_SECONDS``, or did not come back.
    """
    node = find_node(os.environ)
    log.setLevel(logging.INFO)  # where RANK counts nodes, all but the first would be silent
    log.info("%s", node)
    if node.platform == "torchrun worker":
        if (code := run(args)) and ranks.world_size() > 1:
            end_process(code)
        return code
    if ignored := ignored_variables(os.environ):
        log.warning("%s: not used; the launcher reads only the variables in launch --help", ", ".join(ignored))
    processes = node.processes or _gpus() or 1
    # torch elastic would leave all cores to each rank.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cpus() // processes, 1)))
    # One store for all rounds would keep the addresses of dead nodes (torch 2.14).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    forks = find_spec("torch_xla") is None
    if forks:
        start_fork_server(modules)
    checking = _start_check(check, args, node, forks=forks) if node.nodes > 1 and check is not None else None
    with signals.ending_at_once():  # C code that imports a module may turn the exception of a signal into another one
        # Imported while the server imports.
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        from job.cluster.waiting import wait_for_nodes

    if checking is not None:
        checking.join()
        if checking.exitcode == EXIT_USER_ERROR:
            return EXIT_USER_ERROR
    store = wait_for_nodes(node) if node.nodes > 1 else None
    # It logs the traceback of its own exception for each rank that ends; the rank has said why.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_without_traceback)
    config = LaunchConfig(**launch_options(node, processes))
    log.info(
        "torch elastic starts %s, restarts: %d",
        "1 process" if processes == 1 else f"{processes} processes",
        node.restarts,
    )
    try:
        codes = str(temporary.folder("launch"))
        try:
            if forks:
                elastic_launch(config, run_rank)(run, args, codes)
            else:
                elastic_launch(config, sys.executable)("-u", "-m", "job", *args)
        except ChildFailedError as error:
            failed = [failure.exitcode for failure in error.failures.values()]
            if FORK_SERVER_LOST in failed:
                end_ranks(codes, STOP_SECONDS)
            return exit_code(failed, mistakes(codes))
        except SignalException as error:
            return SIGNAL_EXIT_BASE + int(error.sigval)
        except (RendezvousConnectionError, RendezvousTimeoutError) as error:
            raise NodesMissing(
                f"other nodes of {node.nodes} were lost ({type(error).__name__}). A restart waits for them and resumes."
            ) from error
    finally:
        del store  # node 0 has served it until here
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # torch's handlers would raise an exception outside of it
    return 0


def _start_check(check: Callable[..., int], args: list[str], node: Node, *, forks: bool) -> BaseProcess:
    """Start ``check(args)`` in a process of its own, as :func:`launch` starts the ranks."""
    context = multiprocessing.get_context("forkserver") if forks else multiprocessing.get_context("spawn")
    # Ended with this process, should a signal stop it first.
    process = context.Process(target=run_check, args=(check, args, node.node_rank == 0), daemon=True)
    process.start()
    return process


def launch_options(node: Node, processes: int) -> dict[str, Any]:
    """The arguments of torch's ``LaunchConfig`` for ``node``."""
    options: dict[str, Any] = {
        "min_nodes": node.nodes,
        "max_nodes": node.nodes,
        "nproc_per_node": processes,
        "max_restarts": node.restarts,
        "start_method": "forkserver",
        "rdzv_backend": "c10d",
    }
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
        options["signals_to_handle"] = "SIGTERM,SIGINT,SIGQUIT"
    if node.nodes == 1:
        return {**options, "rdzv_endpoint": "localhost:0", "run_id": str(uuid.uuid4())}
    # Left to itself torch compares host names, which a pod's need not be.
    rendezvous = {"is_host": "true" if node.node_rank == 0 else "false", "join_timeout": str(JOIN_SECONDS)}
    return {
        **options,
        "rdzv_endpoint": f"{node.host}:{node.port}",
        "run_id": node.run_id or "job",
        "rdzv_configs": rendezvous,
    }


def _gpus() -> int:
    with signals.ending_at_once():
        import torch

    return torch.cuda.device_count()


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True


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
