"""torch's elastic agent, which starts the ranks of this node for one round and watches them.

The launchers agree on the nodes themselves (:mod:`job.cluster.rounds`), so torch's own rendezvous has nothing to do: it
would wait for a lost node for minutes, keep pickles in the store, and end seconds after the last rank.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from job.cluster import store as stores
from job.cluster.environment import Node
from job.cluster.rounds import Round

JOIN_SECONDS = 30
"""How long the agents wait for one another's numbers of processes; all nodes were there a moment ago."""
EXIT_BARRIER_SECONDS = 1.0
"""How long an agent waits for the others' ranks to finish; then the launchers do, without blocking signals."""


class GatheredNodes(RendezvousHandler):
    """A rendezvous that is over: the nodes of a round.

    Args:
        node: this node.
        current: the round.
    """

    def __init__(self, node: Node, current: Round) -> None:
        self._node = node
        self._round = current

    def get_backend(self) -> str:
        """Name of this kind of rendezvous, for torch's events."""
        return "job"

    @property
    def use_agent_store(self) -> bool:
        """Let the ranks connect to the launchers' store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """The nodes, and a store for the agents' own use."""
        store = stores.connect(self._round.host, self._round.port, timedelta(seconds=JOIN_SECONDS))
        info = RendezvousStoreInfo(self._round.host, self._round.port)
        agents = PrefixStore(f"job.agents/{self._round.id}", store)
        return RendezvousInfo(agents, self._node.node_rank, self._node.nodes, info)

    def is_closed(self) -> bool:
        """Whether the agent may not meet others again: rounds are the launcher's."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """Nodes that would like to join: none, since launchers that come later end the round."""
        return 0

    def get_run_id(self) -> str:
        """Id by which ranks of different rounds are told apart."""
        return self._round.id

    def shutdown(self) -> bool:
        """Do nothing."""
        return True


def run_ranks(
    node: Node,
    current: Round,
    processes: int,
    entrypoint: Callable[..., None] | str,
    args: tuple[Any, ...],
    folder: Path,
) -> list[int]:
    """Run the ranks of this node until all have finished, or one has failed and the others are stopped.

    Args:
        node: this node.
        current: the round.
        processes: number of ranks.
        entrypoint: a function to call in processes forked by multiprocessing's fork server, or a program.
        args: arguments of either.
        folder: for torch's log folders.

    Returns:
        The exit codes of ranks that failed, as far as torch found them; minus the number of the signal, if one killed
        the rank. Empty: all finished.

    Raises:
        SignalException: this process received a signal, which the ranks have been sent, too.
        RuntimeError: another node was lost while the ranks were started (torch's DistError).
        OSError: the same.
    """
    spec = WorkerSpec(
        role="default",
        local_world_size=processes,
        rdzv_handler=GatheredNodes(node, current),
        entrypoint=entrypoint,
        args=args,
        max_restarts=0,
    )
    handled = "SIGTERM,SIGINT,SIGQUIT"
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # by nohup
        handled += ",SIGHUP"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = handled
    agent = LocalElasticAgent(
        spec,
        DefaultLogsSpecs(log_dir=str(folder)),
        start_method="forkserver",
        exit_barrier_timeout=EXIT_BARRIER_SECONDS,
    )
    result = agent.run()
    return [failure.exitcode for failure in result.failures.values()] if result.is_failed() else []


def quieten_torch() -> None:
    """Leave out what torch logs of things that are handled, and of ranks that have said themselves why they ended."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_without_traceback)
    logging.getLogger("torch.distributed.elastic.agent.server.api").addFilter(_is_no_exit_barrier)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True


def _is_no_exit_barrier(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Error waiting on exit barrier")
