"""The node among others: environment variables of the platform, name and port of node 0, exchange between ranks."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from job.check.finding import Finding, fail, ok, warn
from job.check.machine import gigabytes
from job.cluster import ranks
from job.cluster.environment import find_node

NODES, RANKS = "nodes", "ranks"
CONNECT_SECONDS = 3.0
DNS_SECONDS = 8.0
"""A pod's name resolves some time after its start."""
EXCHANGED = {"cuda": 256 << 20, "cpu": 16 << 20}
"""Bytes of the all-reduce that is measured."""
_ROUNDS = 3
_LEAST_BYTES_PER_SECOND = 100e6
"""Rate of an all-reduce below which it slows down any training: that of a network of 1 Gbit/s."""
MEND = "Correct the environment variables; python -m job launch --help lists them."
_ADDRESS_MEND = (
    "Is node 0 running? Correct LAUNCH_COORDINATOR (<job>-0.<service>) or the platform's variables, and let the "
    "headless Service publish addresses that are not ready."
)


def nodes(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether the variables make sense, and node 0 has an address that answers.

    Raises:
        ConfigError: variables are missing, or contradict one another.
    """
    node = find_node(environment)
    if node.nodes == 1:
        yield ok(NODES, f"{node.platform}: one node.")
        return
    if node.platform == "torchrun worker":  # it has met the others
        yield ok(NODES, f"node {node.node_rank} of {node.nodes}, whose ranks torch elastic has started.")
        return
    where = f"node {node.node_rank} of {node.nodes} ({node.platform})"
    if not _has_address(node.host):
        yield fail(NODES, f"{where}: node 0, {node.host}, has no DNS record after {DNS_SECONDS:.0f} s.", _ADDRESS_MEND)
        return
    began = time.monotonic()
    try:
        socket.create_connection((node.host, node.port), CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        yield ok(NODES, f"{where}: node 0, {node.host}, answers; launch opens port {node.port} there.")
    except OSError as error:
        reason = error.strerror or errno.errorcode.get(error.errno or 0) or "no answer"
        yield fail(
            NODES,
            f"{where}: node 0, {node.host}:{node.port}, cannot be reached within {CONNECT_SECONDS:.0f} s ({reason}).",
            "Allow the port between the nodes in the firewall or NetworkPolicy.",
        )
    else:
        milliseconds = 1000 * (time.monotonic() - began)
        yield ok(NODES, f"{where}: node 0, {node.host}:{node.port}, answers after {milliseconds:.0f} ms.")


def _has_address(host: str) -> bool:
    deadline = time.monotonic() + DNS_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        else:
            return True


def all_reduce(device: torch.device) -> tuple[Finding, float]:
    """Measure an all-reduce over all ranks; a collective operation.

    Returns:
        the finding, and bytes of a tensor that are reduced per second.
    """
    values = torch.ones(EXCHANGED.get(device.type, EXCHANGED["cpu"]) // 4, device=device)
    dist.all_reduce(values)  # connects
    _synchronise(device)
    began = time.monotonic()
    for _ in range(_ROUNDS):
        dist.all_reduce(values)
    _synchronise(device)
    seconds = max((time.monotonic() - began) / _ROUNDS, 1e-9)
    rate = values.nbytes / seconds
    backend = "NCCL" if device.type == "cuda" else "gloo"
    message = (
        f"{ranks.world_size()} ranks exchange {gigabytes(values.nbytes)} by {backend} in "
        f"{1000 * seconds:.0f} ms ({gigabytes(rate)}/s)."
    )
    if rate < _LEAST_BYTES_PER_SECOND:
        mend = "Use a faster network between the nodes (on Google Cloud: gVNIC, compact placement), or fewer nodes."
        return warn(RANKS, message, mend), rate
    return ok(RANKS, message), rate


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
