"""Rounds of several launchers, in threads with real stores."""

from __future__ import annotations

import gc
import logging
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from support import free_port, wait_for
from torch.distributed import PrefixStore, TCPStore

from job.cluster import rounds as module
from job.cluster import store, waiting
from job.cluster.environment import Node
from job.cluster.outcomes import FAILED, FINISHED, LOST, REPLACED
from job.cluster.rounds import Round, Rounds
from job.errors import EXIT_NODES_MISSING, NodesMissing, RankLost

SECONDS = 240.0
"""Limit of everything that is waited for: it only keeps a test from hanging."""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(module, "LEAVE_SECONDS", 2)
    monkeypatch.setattr(module, "MISTAKE_SECONDS", 2)
    # A machine that stands still for some seconds is no lost node.
    monkeypatch.setattr(module, "REQUEST_SECONDS", 120.0)
    monkeypatch.setattr(module, "STOPPED_SECONDS", 120.0)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


class Cluster:
    """Launchers of one job."""

    def __init__(self, threads: ThreadPoolExecutor, nodes: int, *, in_place: bool = True, **settings: int) -> None:
        self.in_place = in_place
        self.threads, self.nodes, self.port, self.settings = threads, nodes, free_port(), settings
        self.launchers = [self.launcher(rank) for rank in range(nodes)]
        self.rounds: list[Round] = []
        self.stop = threading.Event()

    def launcher(self, rank: int) -> Rounds:
        settings = {"wait_seconds": 120, **self.settings}
        return Rounds(
            Node("Indexed Job", self.nodes, rank, "localhost", self.port, run_id="run", **settings),
            in_place=self.in_place,
        )

    def gather(self, *codes: int) -> list[Round | int]:
        """Let all gather, with the exit codes of their ranks."""
        futures = [self.begin(rank, code) for rank, code in enumerate(codes or [0] * self.nodes)]
        results = [future.result(SECONDS) for future in futures]
        self.rounds = [result for result in results if isinstance(result, Round)]
        return results

    def begin(self, rank: int, code: int = 0) -> Future[Round | int]:
        return self.threads.submit(self.launchers[rank].gather, code)

    def end(self, *codes: int) -> list[int | None]:
        """End the ranks of all nodes."""
        ends = zip(self.launchers, self.rounds, codes, strict=True)
        futures = [self.threads.submit(launcher.end, current, code) for launcher, current, code in ends]
        return [future.result(SECONDS) for future in futures]

    def watch(self, rank: int) -> Future[str]:
        """How the others end the round, as this node sees it; it is connected when this returns."""
        launcher, has_connected = self.launchers[rank], threading.Event()
        connect = launcher._connect

        def connect_and_tell(current: Round) -> TCPStore:
            try:
                return connect(current)
            finally:
                has_connected.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "_connect", connect_and_tell)
            future = self.threads.submit(launcher.wait_for_end, self.rounds[rank], self.stop)
            assert has_connected.wait(SECONDS)
        return future


def wait_until_finishing(launcher: Rounds) -> None:
    wait_for(lambda: launcher._finishing is not None)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_go_on_when_the_last_one_is_there(
    order: tuple[int, ...], threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cluster = Cluster(threads, 3)
    *early, last = order
    waits = [cluster.begin(rank) for rank in early]
    nothing = rf"waiting for node 0: nothing .* localhost:{cluster.port}"
    words = r"waiting for nodes? .*of 3" if order[0] == 0 else nothing
    wait_for(lambda: re.search(words, caplog.text))
    threading.Event().wait(1)
    assert not any(wait.done() for wait in waits)
    waits.append(cluster.begin(last))
    started = [wait.result(SECONDS) for wait in waits]
    assert len({current.id for current in started if isinstance(current, Round)}) == 1
    assert caplog.text.count("all 3 nodes are running") == 3


def test_a_node_that_has_gone_again_is_missing(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its counter stands still: the others wait for its successor."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(waiting, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(module, "GONE_SECONDS", 0.5)
    cluster = Cluster(threads, 3)
    first = cluster.begin(0)
    wait_for(lambda: "waiting for nodes 1 and 2 of 3" in caplog.text)
    client = PrefixStore("job.nodes/run", TCPStore("localhost", cluster.port, is_master=False, wait_for_workers=False))
    client.set(f"{client.get('round').decode()}/here/1", "gone 1")
    # Node 0 has seen it, and then that it has gone.
    wait_for(lambda: re.search(r"(?s)waiting for node 2 of 3.*waiting for nodes 1 and 2 of 3", caplog.text))
    waits = [first, cluster.begin(2)]
    threading.Event().wait(1)
    assert not any(wait.done() for wait in waits)
    waits.append(cluster.begin(1))
    assert all(isinstance(wait.result(SECONDS), Round) for wait in waits)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, r"still waiting for nodes 1 and 2 of 3 after 1 s"),
        (1, r"still waiting for node 0: nothing answers at localhost"),
    ],
)
def test_a_limit_ends_the_wait(rank: int, message: str, threads: ThreadPoolExecutor) -> None:
    with pytest.raises(NodesMissing, match=message) as caught:
        Cluster(threads, 3, wait_seconds=1).launchers[rank].gather()
    assert caught.value.exit_code == EXIT_NODES_MISSING


def test_a_port_in_use(threads: ThreadPoolExecutor) -> None:
    cluster = Cluster(threads, 2)
    with socket.create_server(("127.0.0.1", cluster.port)), pytest.raises(RankLost, match=f"localhost:{cluster.port}"):
        cluster.launchers[0].gather()


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_node_is_replaced(replaced: int, threads: ThreadPoolExecutor) -> None:
    """The others end their ranks, at the latest when its successor is there, and start again with it; without limit."""
    cluster = Cluster(threads, 2)
    cluster.gather()
    other = 1 - replaced
    for _ in range(3):
        before = cluster.rounds[other].id
        watch = cluster.watch(other)
        threading.Event().wait(0.3)
        assert not watch.done()
        cluster.launchers[replaced] = cluster.launcher(replaced)
        del cluster.rounds[replaced]  # node 0: the last use of its store
        gc.collect()
        newcomer = cluster.begin(replaced)
        assert watch.result(SECONDS) == (REPLACED if replaced else LOST)
        assert not newcomer.done()
        cluster.rounds.insert(replaced, cluster.rounds[0])
        assert cluster.launchers[other].end(cluster.rounds[other], 143) is None
        waits = {replaced: newcomer, other: cluster.begin(other, 143)}
        results = [waits[rank].result(SECONDS) for rank in range(2)]
        cluster.rounds = [result for result in results if isinstance(result, Round)]
        assert len(cluster.rounds) == 2
        assert before != cluster.rounds[0].id == cluster.rounds[1].id
        del newcomer, waits, results
    assert cluster.end(0, 0) == [0, 0]


def test_node_0_is_replaced_before_the_others_watch_the_round(threads: ThreadPoolExecutor) -> None:
    cluster = Cluster(threads, 2)
    cluster.gather()
    cluster.launchers[0] = cluster.launcher(0)
    del cluster.rounds[0]  # the last use of its store
    gc.collect()
    newcomer = cluster.begin(0)
    current = cluster.rounds[0]
    watch = threads.submit(cluster.launchers[1].wait_for_end, current, cluster.stop)
    try:
        assert watch.result(SECONDS) == LOST
    finally:
        cluster.stop.set()
        waits = [newcomer, cluster.begin(1, 143)]
        assert all(isinstance(wait.result(SECONDS), Round) for wait in waits)


@pytest.mark.parametrize(("restarts", "codes"), [(0, [75, 70]), (0, [143, 143]), (1, [143, 143]), (2, [75, 75])])
def test_ranks_that_fail_though_no_node_was_replaced(
    restarts: int, codes: list[int], threads: ThreadPoolExecutor
) -> None:
    """All end with the codes of their ranks, after LAUNCH_RESTARTS; ranks that were signalled are not restarted."""
    cluster = Cluster(threads, 2, restarts=restarts)
    cluster.gather()
    for _ in range(restarts if 143 not in codes else 0):
        assert cluster.end(*codes) == [None, None]
        cluster.gather(*codes)
        assert len(cluster.rounds) == 2
    watch = cluster.watch(1)
    assert cluster.launchers[0].end(cluster.rounds[0], codes[0]) is None
    assert watch.result(SECONDS) == FAILED
    assert cluster.gather(*codes) == codes


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_users_mistake_ends_all(mistaken: int, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(threads, 3)
    cluster.gather()
    others = [rank for rank in range(3) if rank != mistaken]
    watches = [cluster.watch(rank) for rank in others]
    end = threads.submit(cluster.launchers[mistaken].end, cluster.rounds[mistaken], 2)
    assert [watch.result(SECONDS) for watch in watches] == [FAILED, FAILED]
    assert [cluster.begin(rank, 75).result(SECONDS) for rank in sorted(others, reverse=True)] == [2, 2]
    assert end.result(SECONDS) == 2
    assert f"the ranks of node {mistaken} ended because of a mistake" in caplog.text


def test_a_node_that_starts_again_does_not_leave_for_another_one(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAVE_SECONDS", 240)
    cluster = Cluster(threads, 3)
    cluster.gather()
    assert cluster.launchers[1].end(cluster.rounds[1], 2) == 2
    cluster.launchers[1] = cluster.launcher(1)
    assert cluster.begin(1).result(SECONDS) == 2
    served = cluster.begin(0, 75)
    with pytest.raises(TimeoutError):
        served.result(0.5)  # node 2 has yet to read of the mistake
    assert cluster.begin(2, 75).result(SECONDS) == 2
    assert served.result(SECONDS) == 2


def test_a_node_that_is_lost_while_others_finish(threads: ThreadPoolExecutor) -> None:
    """They stay until it has finished, too: its successor could do nothing alone."""
    cluster = Cluster(threads, 3)
    cluster.gather()
    ends = [threads.submit(cluster.launchers[rank].end, cluster.rounds[rank], 0) for rank in (0, 1)]
    threading.Event().wait(0.5)
    assert not any(end.done() for end in ends)
    cluster.launchers[2] = cluster.launcher(2)
    newcomer = cluster.begin(2)
    assert [end.result(SECONDS) for end in ends] == [None, None]
    waits = [cluster.begin(0), cluster.begin(1), newcomer]
    results = [wait.result(SECONDS) for wait in waits]
    cluster.rounds = [result for result in results if isinstance(result, Round)]
    assert cluster.end(0, 0, 0) == [0, 0, 0]
    assert all(launcher.may_leave() for launcher in cluster.launchers)


def test_a_finished_node_that_is_stopped_asks_the_others(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 0 it would never be started again, and they might need it."""
    cluster = Cluster(threads, 2)
    cluster.gather()
    assert not any(launcher.may_leave() for launcher in cluster.launchers)
    threads.submit(cluster.launchers[1].end, cluster.rounds[1], 0)
    wait_until_finishing(cluster.launchers[1])
    stopped = threads.submit(cluster.launchers[1].may_leave)
    threading.Event().wait(0.5)
    assert cluster.launchers[0].end(cluster.rounds[0], 0) == 0
    assert stopped.result(SECONDS)

    monkeypatch.setattr(module, "STOPPED_SECONDS", 0.5)
    cluster = Cluster(threads, 2)
    cluster.gather()
    ends = [threads.submit(cluster.launchers[1].end, cluster.rounds[1], 0)]
    wait_until_finishing(cluster.launchers[1])
    assert not cluster.launchers[1].may_leave()
    ends.append(threads.submit(cluster.launchers[0].end, cluster.rounds[0], 0))
    assert [end.result(SECONDS) for end in ends] == [None, None]


def test_node_0_that_is_stopped_while_others_finish(threads: ThreadPoolExecutor) -> None:
    cluster = Cluster(threads, 2)
    cluster.gather()
    cluster.launchers[0]._finishing = cluster.rounds[0]  # a signal has interrupted its ``end``
    stopped = threads.submit(cluster.launchers[0].may_leave)
    threading.Event().wait(0.5)
    assert cluster.launchers[1].end(cluster.rounds[1], 0) == 0
    assert stopped.result(SECONDS)


def test_ranks_that_fail_after_others_have_finished(threads: ThreadPoolExecutor) -> None:
    """A node may not end with 0 while another one needs it."""
    cluster = Cluster(threads, 2)
    cluster.gather()
    assert cluster.end(0, 75) == [None, None]
    assert cluster.gather(0, 75) == [75, 75]


def test_ranks_that_fail_after_others_have_finished_on_tpu(threads: ThreadPoolExecutor) -> None:
    """The finished node must start again, too: after exit code 0 Kubernetes would not let it."""
    cluster = Cluster(threads, 2, in_place=False)
    cluster.gather()
    assert cluster.end(0, 70) == [75, 70]


def test_a_failure_that_the_store_has_missed(threads: ThreadPoolExecutor) -> None:
    """The node reports it again while it waits for the next round; else all would wait for one another."""
    cluster = Cluster(threads, 2, restarts=1)
    cluster.gather()
    end = threads.submit(cluster.launchers[0].end, cluster.rounds[0], 0)
    waiting_node = cluster.begin(1, 75)
    assert end.result(SECONDS) is None
    results = [cluster.begin(0).result(SECONDS), waiting_node.result(SECONDS)]
    assert all(isinstance(result, Round) for result in results)


def test_a_node_that_learns_late_that_all_have_finished(threads: ThreadPoolExecutor) -> None:
    cluster = Cluster(threads, 2)
    cluster.gather()
    cluster.rounds[0].keys.set("over", FINISHED)
    assert cluster.begin(1, 75).result(SECONDS) == 0


def test_one_node_alone(threads: ThreadPoolExecutor) -> None:
    cluster = Cluster(threads, 1, restarts=1)
    cluster.gather()
    assert cluster.end(75) == [None]
    cluster.gather(75)
    assert cluster.end(75) == [75]
    assert Cluster(threads, 1, restarts=1).gather()
    for code in (2, 130, 143, 0):
        launcher = Cluster(threads, 1, restarts=1).launchers[0]
        current = launcher.gather()
        assert isinstance(current, Round)
        assert launcher.end(current, code) == code


def test_a_store_is_served_at_one_address_alone() -> None:
    served = store.serve("localhost", 0, timedelta(seconds=60))
    store.connect("127.0.0.1", served.port, timedelta(seconds=60)).set("key", "value")
    assert served.get("key") == b"value"
    with pytest.raises(OSError, match="refused"):
        store.connect("127.0.0.2", served.port, timedelta(seconds=5))


@pytest.mark.parametrize("address", ["127.0.1.1", "198.51.100.7"])
def test_a_name_that_is_no_address_of_this_machine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a load balancer, or with a line of its own in /etc/hosts: others could not reach it there."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with store._listening_socket("train-0", 0) as server:
        assert server.getsockname()[0] in ("::", "0.0.0.0")


@pytest.mark.parametrize("text", ["{", "null", '"x"', '["a", 99, -1, {}]', "[2]"])
def test_what_node_0_says_is_data(text: str) -> None:
    assert module._missing(text, Node("Indexed Job", 3, 2)) == []
    assert module._tokens(text) is None
