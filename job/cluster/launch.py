"""Launch the ranks of this node by torch's elastic agent: the entry point of a container."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from job.cluster import ranks
from job.cluster.environment import Node, find_node, ignored_variables
from job.cluster.rank_process import end_ranks, mistakes, run_rank, start_fork_server
from job.errors import (
    EXIT_HANGUP,
    EXIT_INTERNAL_ERROR,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_RETRY,
    EXIT_USER_ERROR,
    RankLost,
)
from job.process import signals, temporary
from job.process.cpus import available_cpus
from job.process.ending import end_process

log = logging.getLogger(__name__)

DNS_SECONDS = 600.0
"""A pod's name resolves some time after its start (kubernetes#117819), and node 0 may still be pulling its image."""
SIGNAL_EXIT_BASE = 128
FORK_SERVER_LOST = 255
"""Exit code that multiprocessing reports of a process whose fork server has ended."""
STOP_SECONDS = 30.0
"""Seconds that ranks have to save their state; torch elastic gives them as many."""


def launch(args: list[str], run: Callable[[list[str]], int], modules: list[str]) -> int:
    """Run ``run(args)`` in as many processes as this node should have; returns the exit code.

    The ranks are forked from one process that has imported ``modules`` and touched no device: eight ranks import once,
    and ranks that torch elastic restarts (``LAUNCH_RESTARTS``) do not import at all. Where torch-xla is installed,
    which starts threads when it is imported, a rank is a new process, ``python -m job``.

    The exit code is the ranks' own, where torchrun's would be 1: that of a user's mistake (2) before that of a stop on
    request (130, 129, 143), of an unexpected exception (70) and of what a restart may mend (75). After a signal torch
    elastic gives the ranks 30 s to save.

    Args:
        args: a command of ``python -m job`` with its options.
        run: the command line as a function, by a name that can be imported.
        modules: modules that the command needs.

    Raises:
        ConfigError: the environment is not understood.
        RankLost: node 0 has no address.
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
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores() // processes, 1)))
    # One store for all rounds would keep the addresses of dead nodes (torch 2.14).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    forks = find_spec("torch_xla") is None
    if forks:
        start_fork_server(modules)
    if node.nodes > 1:
        wait_for_address(node.host, DNS_SECONDS)
    with signals.ending_at_once():  # C code that imports a module may turn the exception of a signal into another one
        # Imported while the server imports.
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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
    finally:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # torch's handlers would raise an exception outside of it
    return 0


def cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this container may use: those of its affinity, or fewer by its CPU limit, at least one.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), and version 1's cpu.cfs_quota_us.
    """
    count = available_cpus()
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # "max" and -1: no limit
            quota, period = (int(word) for word in " ".join((root / file).read_text() for file in files).split())
            if quota > 0:
                count = min(count, quota // period)
    return max(count, 1)


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
    rendezvous = {"is_host": "true" if node.node_rank == 0 else "false", "join_timeout": str(int(DNS_SECONDS))}
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


def wait_for_address(host: str, seconds: float) -> None:
    """Wait until ``host`` has an address.

    Raises:
        RankLost: it has none in time.
    """
    deadline = time.monotonic() + seconds
    logged = False
    while True:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise RankLost(
                    f"the coordinator {host} has no DNS record after {seconds:.0f} s ({error.strerror}). Is node 0 "
                    "running, and does its service have this name?"
                ) from error
            if not logged:
                log.info("waiting for the DNS record of the coordinator %s", host)
                logged = True
            time.sleep(1)
        else:
            return


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
