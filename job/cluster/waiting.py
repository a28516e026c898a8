"""Wait for the other nodes of the job before torch's rendezvous, which would give up and fail.

A node whose machine has yet to come is no failure: the others wait for it, and name it. Node 0 hosts the store of the
rendezvous from the beginning. The others write a counter there, so that node 0 also notices those that have gone again,
and lets all of them go on at the same time.
"""

from __future__ import annotations

import json
import logging
import socket
import time
import uuid
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from job.cluster.environment import Node
from job.errors import NodesMissing, RankLost, first_line

log = logging.getLogger(__name__)

LOG_SECONDS = 60.0
POLL_SECONDS = 0.5
CONNECT_SECONDS = 2.0
GONE_SECONDS = 15.0
"""A node whose counter has not changed for so long is missing."""
NAMED_NODES = 8
"""Number of missing nodes that a message lists."""
_STORE_TIMEOUT = timedelta(seconds=10)


@dataclass
class Wait:
    """The time that this node has waited.

    Attributes:
        limit: seconds after which waiting ends with an error; None: never.
    """

    limit: float | None
    _begun: float = field(default_factory=time.monotonic)
    _logged: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun

    def report(self, missing: str) -> None:
        """Log what is missing, at first and then every minute.

        Raises:
            NodesMissing: the limit has passed.
        """
        if self.limit is not None and self.seconds > self.limit:
            raise NodesMissing(
                f"still waiting for {missing} after {self.limit:.0f} s, the limit. Are all nodes running? Unset "
                "LAUNCH_WAIT_SECONDS to wait without limit."
            )
        if self._logged is None or time.monotonic() - self._logged >= LOG_SECONDS:
            log.info("waiting for %s%s", missing, "" if self._logged is None else f", for {self.seconds / 60:.0f} min")
            self._logged = time.monotonic()


def wait_for_nodes(node: Node) -> Store:
    """Wait until all nodes of the job are running.

    Returns:
        The store of the rendezvous, which must be kept on node 0 until the ranks have ended.

    Raises:
        NodesMissing: some are missing after ``node.wait_seconds``.
        RankLost: on node 0, another process uses the port.
    """
    wait = Wait(node.wait_seconds)
    wait_for_address(node.host, wait)
    store = _gather(node, wait) if node.node_rank == 0 else _join(node, wait)
    log.info("all %d nodes are running, after %.0f s", node.nodes, wait.seconds)
    return store


def wait_for_address(host: str, wait: Wait) -> None:
    """Wait until the name of node 0 has an address.

    A pod's name resolves some time after its start (kubernetes#117819).

    Raises:
        NodesMissing: it has none in time.
    """
    while True:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror as error:
            wait.report(f"node 0: {host} has no DNS record ({error.strerror})")
            time.sleep(POLL_SECONDS)
        else:
            return


def _gather(node: Node, wait: Wait) -> Store:
    """On node 0, wait for the counters of all others."""
    # Multi-tenant: torch's rendezvous in this process uses the same server.
    try:
        store = TCPStore(node.host, node.port, is_master=True, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        raise RankLost(f"node 0 cannot serve the rendezvous at {node.host}:{node.port}: {first_line(error)}") from error
    present = _prefixed(store, node)
    counters: dict[int, tuple[bytes, float]] = {}
    while True:
        now = time.monotonic()
        for rank in range(1, node.nodes):
            counter = present.get(str(rank)) if present.check([str(rank)]) else b""
            if counter and counter != counters.get(rank, (b"", now))[0]:
                counters[rank] = (counter, now)
        missing = [r for r in range(1, node.nodes) if r not in counters or now - counters[r][1] > GONE_SECONDS]
        if not missing:
            present.set("complete", "1")
            return store
        present.set("missing", json.dumps(missing))
        wait.report(_named(missing, node.nodes))
        time.sleep(POLL_SECONDS)


def _join(node: Node, wait: Wait) -> Store:
    """On the other nodes, count until node 0 has seen all of them."""
    token, count = uuid.uuid4().hex, 0
    while True:
        try:
            # Without this torch would log each attempt.
            socket.create_connection((node.host, node.port), CONNECT_SECONDS).close()
            store = TCPStore(node.host, node.port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
            present = _prefixed(store, node)
            while True:
                count += 1
                present.set(str(node.node_rank), f"{token} {count}")
                if present.check(["complete"]):
                    return store
                others = present.get("missing") if present.check(["missing"]) else b"[]"
                wait.report(_named(_ranks(others, node), node.nodes))
                time.sleep(POLL_SECONDS)
        except (OSError, RuntimeError):  # torch's DistNetworkError is a RuntimeError
            wait.report(f"node 0: nothing answers at {node.host}:{node.port}")
            time.sleep(POLL_SECONDS)


def _prefixed(store: Store, node: Node) -> PrefixStore:
    return PrefixStore(f"job.nodes/{node.run_id}", store)


def _ranks(text: bytes, node: Node) -> list[int]:
    """The missing nodes as node 0 lists them, this one excepted."""
    try:
        values = json.loads(text)
    except ValueError:
        return []
    known = set(range(1, node.nodes)) - {node.node_rank}
    return sorted(known.intersection(v for v in values if isinstance(v, int))) if isinstance(values, list) else []


def _named(missing: list[int], nodes: int) -> str:
    if not missing:
        return f"the other nodes of {nodes}"
    names = [str(rank) for rank in missing[:NAMED_NODES]]
    if len(missing) > NAMED_NODES:
        names.append(f"{len(missing) - NAMED_NODES} more")
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return f"node{'s' if len(missing) > 1 else ''} {listed} of {nodes}"
