"""Rounds: the ranks of all nodes start together, and when those of one node have ended, all start again.

A node is a launcher, which outlives its ranks. Before each round the launchers wait for one another, without limit: a
node whose machine has yet to come is no failure. A node that is preempted ends, with its container. The others stay,
wait for its successor, and start their ranks again, which resume from the last checkpoint; so a preemption replaces one
container, and is not counted by anybody.

Node 0 serves a store, and chooses a new id for each round. If node 0 itself is replaced, the others find its successor
by its name, with a store of its own. In the store, below ``job.nodes/<LAUNCH_ID>``:

- ``round``: id of the newest round.
- ``mistake``: node whose ranks ended because of a user's mistake; all nodes end.
- ``left/<node>``: this node has read that all end.

and below the id of a round:

- ``here/<node>``: of a waiting node: its launcher's token, and a counter by which node 0 notices that it has gone.
- ``missing``: nodes that node 0 waits for.
- ``start``: the tokens of all nodes, when they are complete; "null" where a restart is no use.
- ``ended/<node>``: the ranks of this node have finished.
- ``over``: how the round ended: see :mod:`job.cluster.outcomes`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from job.cluster import store as stores
from job.cluster import waiting
from job.cluster.environment import Node
from job.cluster.outcomes import FAILED, FINISHED, LOST, REPLACED
from job.cluster.waiting import Wait, named, wait_for_address
from job.errors import (
    EXIT_HANGUP,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_RETRY,
    EXIT_USER_ERROR,
    RankLost,
    first_line,
)
from job.process.periodic import call_within

log = logging.getLogger(__name__)

T = TypeVar("T")

GONE_SECONDS = 15.0
"""A node whose counter has not changed for so long is missing."""
REQUEST_SECONDS = 10.0
"""Limit of a request to the store: the connection to a machine that has lost its power stays open."""
LEAVE_SECONDS = 10.0
"""How long node 0 still serves the store when all nodes may end."""
MISTAKE_SECONDS = 45.0
"""As LEAVE_SECONDS, where the ranks of other nodes have yet to end, or to be killed after 30 s."""
STOPPED_SECONDS = 8.0
"""How long a node that is told to stop waits for the ranks of the others to finish, as its own have."""
FINISH_POLL_SECONDS = 0.1
_STOPPED = (EXIT_PREEMPTED, EXIT_INTERRUPTED, EXIT_HANGUP)
_LOST_ERRORS = (OSError, RuntimeError)
"""torch's DistNetworkError is a RuntimeError, TimeoutError an OSError."""


@dataclass(frozen=True)
class Round:
    """A start of the ranks of all nodes together.

    Attributes:
        id: unlike that of any other round.
        host: name or address of node 0.
        port: of the store there.
        keys: the keys of this round in the store.
    """

    id: str
    host: str
    port: int
    keys: Store


class Rounds:
    """The rounds of the job, from the point of view of this node.

    Args:
        node: this node.
        in_place: start the ranks again on this node when another node was replaced.

    Attributes:
        in_place: whether the ranks are started again.
    """

    def __init__(self, node: Node, *, in_place: bool) -> None:
        self._node = node
        self.in_place = in_place and node.nodes > 1
        self._token = uuid.uuid4().hex
        self._served: TCPStore | None = None
        self._last = ""
        self._nodes: dict[str, str] = {}
        self._restarts = 0
        self._finishing: Round | None = None

    def gather(self, code: int = 0) -> Round | int:
        """Wait until all nodes of the job are there.

        Args:
            code: exit code of this node's ranks in the last round.

        Returns:
            The next round; or the exit code of this node, if there is none.

        Raises:
            NodesMissing: some are missing after ``node.wait_seconds``.
            RankLost: on node 0, another process uses the port.
        """
        if self._node.nodes == 1:
            return self._alone()
        wait = Wait(self._node.wait_seconds)
        wait_for_address(self._node.host, wait)
        result = self._gather(wait, code) if self._node.node_rank == 0 else self._join(wait, code)
        if isinstance(result, Round):
            log.info("all %d nodes are running, after %.0f s", self._node.nodes, wait.seconds)
            self._last = result.id
        return result

    def end(self, current: Round, code: int) -> int | None:
        """Say that the ranks of this node have ended.

        Args:
            current: the round.
            code: their exit code.

        Returns:
            The exit code of this node; None: there may be another round.
        """
        if self._node.nodes == 1:
            return None if code and self._restart_helps(code) else code
        if code == 0:
            return self._finish(current)
        if code == EXIT_USER_ERROR:
            self._quietly(lambda: self._report_mistake(current))
            if self._node.node_rank == 0:
                self._leave(self._job(current), MISTAKE_SECONDS)
            return code
        self._quietly(lambda: current.keys.compare_set("over", "", FAILED))
        return None if self.in_place else code

    def may_leave(self) -> bool:
        """Whether this node may end with exit code 0 at a signal: the ranks of all nodes have finished.

        Where only its own have, and the others do not follow in ``STOPPED_SECONDS``, this node counts as replaced:
        they wait for its successor.
        """
        if (current := self._finishing) is None:
            return False
        deadline = time.monotonic() + STOPPED_SECONDS
        try:
            while not self._over(current) and time.monotonic() < deadline:
                time.sleep(FINISH_POLL_SECONDS)
            over = self._request(lambda: current.keys.compare_set("over", "", REPLACED))
        except _LOST_ERRORS:
            return False
        if over != FINISHED.encode():
            return False
        self._part(current)
        return True

    def wait_for_end(self, current: Round, stop: threading.Event) -> str:
        """Wait until the ranks of another node have ended; called in a thread, while those of this node run.

        Returns:
            How the round ended; empty: ``stop`` was set.
        """
        try:
            # Of its own, since a connection serves one request at a time.
            job = self._request(lambda: _prefixed(self._connect(current), self._node))
            keys = PrefixStore(current.id, job)
            is_newest = self._request(lambda: _text(job, "round")) == current.id
            if not is_newest and not self._request(lambda: keys.check(["over"])):
                return LOST  # the store is already that of node 0's successor
            while not stop.wait(waiting.POLL_SECONDS):
                if self._request(lambda: keys.check(["over"])):
                    return self._request(lambda: _text(keys, "over"))
        except _LOST_ERRORS:
            return "" if stop.is_set() else LOST
        return ""

    def _alone(self) -> Round:
        if self._served is None:
            self._served = stores.serve("127.0.0.1", 0, timedelta(seconds=REQUEST_SECONDS))
        round_id = uuid.uuid4().hex
        return Round(
            round_id, "127.0.0.1", self._served.port, PrefixStore(round_id, _prefixed(self._served, self._node))
        )

    def _gather(self, wait: Wait, code: int) -> Round | int:
        """On node 0, wait for the counters of all others."""
        if self._served is None:
            self._served = self._serve()
        job, round_id = _prefixed(self._served, self._node), uuid.uuid4().hex
        keys = PrefixStore(round_id, job)
        job.set("round", round_id)
        here: dict[int, tuple[str, float]] = {}
        while True:
            if (mistake := self._mistake(job)) is not None:
                self._leave(job, LEAVE_SECONDS)
                return mistake
            now = time.monotonic()
            for rank in range(1, self._node.nodes):
                counter = _text(keys, f"here/{rank}")
                if counter and counter != here.get(rank, ("", now))[0]:
                    here[rank] = (counter, now)
            missing = [r for r in range(1, self._node.nodes) if r not in here or now - here[r][1] > GONE_SECONDS]
            if not missing:
                break
            keys.set("missing", json.dumps(missing))
            wait.report(named(missing, self._node.nodes))
            time.sleep(waiting.POLL_SECONDS)
        nodes = {"0": self._token, **{str(rank): counter.partition(" ")[0] for rank, (counter, _) in here.items()}}
        useful = nodes != self._nodes or self._restart_helps(code)
        self._nodes = nodes
        keys.set("start", json.dumps(nodes if useful else None))
        if useful:
            return Round(round_id, self._node.host, self._served.port, keys)
        self._leave(job, LEAVE_SECONDS)
        return code or EXIT_RETRY

    def _restart_helps(self, code: int) -> bool:
        """Whether ranks that ended with ``code``, though no node was replaced, are started again."""
        if code in (EXIT_USER_ERROR, *_STOPPED) or self._restarts >= self._node.restarts:
            return False
        self._restarts += 1
        return True

    def _join(self, wait: Wait, code: int) -> Round | int:
        """On the other nodes, count until node 0 has seen all of them."""
        address = f"{self._node.host}:{self._node.port}"
        count = 0
        while True:
            try:
                store = self._request(lambda: stores.connect(self._node.host, self._node.port, _TIMEOUT))
                job = _prefixed(store, self._node)
                while True:
                    count += 1
                    counter = f"{self._token} {count}"
                    result = self._request(lambda: self._announce(job, counter, code))  # noqa: B023
                    if not isinstance(result, str):
                        return result
                    wait.report(result)
                    time.sleep(waiting.POLL_SECONDS)
            except _LOST_ERRORS:
                wait.report(f"node 0: nothing answers at {address}")
                time.sleep(waiting.POLL_SECONDS)

    def _announce(self, job: Store, counter: str, code: int) -> Round | int | str:
        """Show node 0 that this node is there; returns the missing nodes in words until all are."""
        if (mistake := self._mistake(job)) is not None:
            self._note_leaving(job)
            return mistake
        others = named([], self._node.nodes)
        round_id = _text(job, "round")
        if not round_id:
            return others
        keys = PrefixStore(round_id, job)
        if round_id == self._last:
            # Node 0 has yet to notice that this round is over: the store may not have answered the request to say so.
            keys.compare_set("over", "", FAILED)
            return self._finished(job) if _text(keys, "over") == FINISHED else others
        if not (start := _text(keys, "start")):
            keys.set(f"here/{self._node.node_rank}", counter)
            return named(_missing(_text(keys, "missing"), self._node), self._node.nodes)
        if (nodes := _tokens(start)) is None:
            self._note_leaving(job)
            return code or EXIT_RETRY
        if nodes.get(str(self._node.node_rank)) == self._token:
            return Round(round_id, self._node.host, self._node.port, keys)
        # This node takes the place of one that has gone, and whose round goes on or hangs.
        keys.compare_set("over", "", REPLACED)
        return self._finished(job) if _text(keys, "over") == FINISHED else others

    def _finished(self, job: Store) -> int:
        log.info("the other nodes have finished")
        self._note_leaving(job)
        return 0

    def _report_mistake(self, current: Round) -> None:
        job = self._job(current)
        job.set("mistake", str(self._node.node_rank))
        # Else ranks that hang, rather than fail, would never end.
        current.keys.compare_set("over", "", FAILED)
        if self._node.node_rank > 0:
            self._note_leaving(job)

    def _mistake(self, job: Store) -> int | None:
        if not (rank := _text(job, "mistake")):
            return None
        log.error("the ranks of node %s ended because of a mistake, which its log explains", rank)
        return EXIT_USER_ERROR

    def _finish(self, current: Round) -> int | None:
        """Wait until the ranks of all nodes have finished: a node that is replaced meanwhile needs the others."""
        self._finishing = current
        try:
            if self._node.node_rank > 0:
                self._request(lambda: current.keys.set(f"ended/{self._node.node_rank}", "0"))
            while not (over := self._over(current)):
                time.sleep(FINISH_POLL_SECONDS)
            if over == FINISHED:
                self._part(current)
                return 0
        except _LOST_ERRORS:
            log.warning("node 0 was lost after the ranks of this node had finished")
        self._finishing = None
        # Not 0: Kubernetes would never start this node again, and the others would wait for it.
        return None if self.in_place else EXIT_RETRY

    def _over(self, current: Round) -> str:
        """How the round ended, empty: it goes on; node 0 notes that the ranks of all nodes have finished."""
        if self._node.node_rank == 0:
            others = [f"ended/{rank}" for rank in range(1, self._node.nodes)]
            if self._request(lambda: current.keys.check(others)):
                self._request(lambda: current.keys.compare_set("over", "", FINISHED))
        return self._request(lambda: _text(current.keys, "over"))

    def _part(self, current: Round) -> None:
        """Let node 0 know that this node has read that all end; on node 0, wait for the others."""
        if self._node.node_rank == 0:
            self._leave(self._job(current), LEAVE_SECONDS)
        else:
            self._quietly(lambda: self._note_leaving(self._job(current)))

    def _leave(self, job: Store, seconds: float) -> None:
        """On node 0, serve the store until the other nodes have read that all end, or for so many seconds."""
        deadline = time.monotonic() + seconds
        others = [f"left/{rank}" for rank in range(1, self._node.nodes)]
        while not job.check(others) and time.monotonic() < deadline:
            time.sleep(FINISH_POLL_SECONDS)

    def _note_leaving(self, job: Store) -> None:
        """Let node 0 know that this node has read that all end."""
        job.set(f"left/{self._node.node_rank}", "1")

    def _serve(self) -> TCPStore:
        try:
            return stores.serve(self._node.host, self._node.port, _TIMEOUT)
        except (OSError, RuntimeError) as error:
            raise RankLost(
                f"node 0 cannot serve the rendezvous at {self._node.host}:{self._node.port}: {first_line(error)}"
            ) from error

    def _connect(self, current: Round) -> TCPStore:
        return stores.connect(current.host, current.port, _TIMEOUT)

    def _job(self, current: Round) -> Store:
        assert isinstance(current.keys, PrefixStore)
        return current.keys.underlying_store

    def _request(self, function: Callable[[], T]) -> T:
        return call_within(REQUEST_SECONDS, function, "store")

    def _quietly(self, function: Callable[[], object]) -> None:
        try:
            self._request(function)
        except _LOST_ERRORS:
            log.info("node 0 does not answer any more")


_TIMEOUT = timedelta(seconds=REQUEST_SECONDS)


def _prefixed(store: Store, node: Node) -> PrefixStore:
    return PrefixStore(f"job.nodes/{node.run_id}", store)


def _text(store: Store, key: str) -> str:
    """The value of a key; empty: it has none."""
    return store.get(key).decode(errors="replace") if store.check([key]) else ""


def _tokens(text: str) -> dict[str, object] | None:
    """The launchers that start a round, as node 0 lists them; None: no round starts."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _missing(text: str, node: Node) -> list[int]:
    """The missing nodes as node 0 lists them, this one excepted."""
    try:
        values = json.loads(text)
    except ValueError:
        return []
    known = set(range(1, node.nodes)) - {node.node_rank}
    return sorted(known.intersection(v for v in values if isinstance(v, int))) if isinstance(values, list) else []
