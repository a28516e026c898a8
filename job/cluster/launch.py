"""Launch the ranks of this node by torchrun: the entry point of a container."""

from __future__ import annotations

import contextlib
import logging
import os
import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from job.cluster.environment import Node, find_node
from job.errors import (
    EXIT_HANGUP,
    EXIT_INTERNAL_ERROR,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_RETRY,
    EXIT_USER_ERROR,
    RankLost,
)
from job.process.cpus import usable_cpus

log = logging.getLogger(__name__)

DNS_SECONDS = 600.0
"""A pod's name resolves some time after its start (kubernetes#117819), and node 0 may still be pulling its image."""
SIGNAL_EXIT_BASE = 128


def launch(args: list[str]) -> int:
    """Run ``python -m job ARGS`` in the processes of this node; returns the exit code.

    It is the ranks' own exit code, where torchrun's would be 1. Of several, a user's mistake (2) comes before a stop on
    request (130, 129, 143), an unexpected exception (70) and a failure that a restart may fix (75). After a
    signal torchrun gives the ranks 30 s to save.

    Raises:
        ConfigError: the environment is not understood.
        RankLost: node 0 has no address.
    """
    node = find_node(os.environ)
    log.setLevel(logging.INFO)  # where RANK counts nodes, all but the first would be silent
    log.info("%s", node)
    if node.platform == "torchrun worker":
        sys.argv = ["job", *args]
        runpy.run_module("job", run_name="__main__", alter_sys=True)
        return 0
    processes = node.processes or max(torch.cuda.device_count(), 1)
    if node.nodes > 1:
        wait_for_address(node.host, DNS_SECONDS)
    # torchrun would limit each rank to one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores() // processes, 1)))
    # One store for all rounds would keep the addresses of dead nodes (torch 2.14).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = torchrun_options(node, processes)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
        options.append("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
    log.info("torchrun %s", " ".join(options))
    try:
        run(parse_args([*options, "-m", "job", *args]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return exit_code([failure.exitcode for failure in error.failures.values()])
    except SignalException as error:
        return SIGNAL_EXIT_BASE + int(error.sigval)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # torchrun's handlers would raise an exception outside of it
    return 0


def cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this container may use: those of its affinity, or fewer by its CPU limit, at least one.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), and version 1's cpu.cfs_quota_us.
    """
    count = usable_cpus()
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # "max" and -1: no limit
            quota, period = (int(word) for word in " ".join((root / file).read_text() for file in files).split())
            if quota > 0:
                count = min(count, quota // period)
    return max(count, 1)


def torchrun_options(node: Node, processes: int) -> list[str]:
    """Options of torchrun for ``node``."""
    if node.nodes == 1:
        return ["--standalone", f"--nproc-per-node={processes}"]
    return [
        f"--nnodes={node.nodes}",
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={node.host}:{node.port}",
        f"--rdzv-id={node.run_id or 'job'}",
        # By default torchrun compares host names, which need not match in a pod.
        f"--rdzv-conf=is_host={'true' if node.node_rank == 0 else 'false'},join_timeout={DNS_SECONDS:.0f}",
    ]


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
                    f"{host}, where the nodes meet, has no address after {seconds:.0f} s ({error.strerror}). Is node 0 "
                    "running, and does its service have this name?"
                ) from error
            if not logged:
                log.info("waiting for %s to have an address", host)
                logged = True
            time.sleep(1)
        else:
            return


def exit_code(codes: list[int]) -> int:
    """One code for a node whose ranks ended with ``codes``; a rank that a signal killed has minus its number."""
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
    return EXIT_RETRY if any(code < 0 for code in codes) else EXIT_INTERNAL_ERROR
