"""Nodes that wait for one another, in threads with real stores."""

from __future__ import annotations

import logging
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import PrefixStore, TCPStore

from job.cluster import waiting
from job.cluster.environment import Node
from job.cluster.waiting import Wait, wait_for_address, wait_for_nodes
from job.errors import EXIT_NODES_MISSING, NodesMissing


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.05)


def node(rank: int, nodes: int, port: int, wait_seconds: int | None = 20) -> Node:
    return Node("Indexed Job", nodes, rank, "localhost", port, run_id="run", wait_seconds=wait_seconds)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_go_on_when_the_last_one_is_there(order: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    *early, last = order
    with ThreadPoolExecutor(3) as threads:
        waits = [threads.submit(wait_for_nodes, node(rank, 3, port)) for rank in early]
        threading.Event().wait(1)
        assert not any(wait.done() for wait in waits)
        waits.append(threads.submit(wait_for_nodes, node(last, 3, port)))
        stores = [wait.result(30) for wait in waits]
    assert len(stores) == 3
    expected = r"waiting for nodes? .*of 3" if order[0] == 0 else rf"waiting for node 0: nothing .* localhost:{port}"
    assert re.search(expected, caplog.text)
    assert caplog.text.count("all 3 nodes are running") == 3


def test_a_node_that_has_gone_again_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counter stands still: the others wait for its successor."""
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.5)
    port = free_port()
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(wait_for_nodes, node(0, 3, port))
        client = TCPStore("localhost", port, is_master=False, wait_for_workers=False)
        PrefixStore("job.nodes/run", client).set("1", "gone 1")
        threading.Event().wait(1)
        others = [threads.submit(wait_for_nodes, node(2, 3, port))]
        threading.Event().wait(1)
        assert not first.done()
        others.append(threads.submit(wait_for_nodes, node(1, 3, port)))
        for wait in [first, *others]:
            wait.result(30)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, r"still waiting for nodes 1 and 2 of 3 after 1 s"),
        (1, r"still waiting for node 0: nothing answers at localhost"),
    ],
)
def test_a_limit_ends_the_wait(rank: int, message: str) -> None:
    with pytest.raises(NodesMissing, match=message) as caught:
        wait_for_nodes(node(rank, 3, free_port(), wait_seconds=1))
    assert caught.value.exit_code == EXIT_NODES_MISSING


def test_a_name_without_address() -> None:
    wait_for_address("localhost", Wait(5))
    with pytest.raises(NodesMissing, match=r"node 0: no-such-node-0\.invalid has no DNS record"):
        wait_for_address("no-such-node-0.invalid", Wait(0))


def test_who_is_missing_is_said_every_minute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert waiting.LOG_SECONDS == 60
    monkeypatch.setattr(waiting, "LOG_SECONDS", 0.3)
    caplog.set_level(logging.INFO)
    wait = Wait(None)
    while wait.seconds < 1:
        wait.report("node 1 of 2")
    first, *later = [record.getMessage() for record in caplog.records]
    assert first == "waiting for node 1 of 2"
    assert later == ["waiting for node 1 of 2, for 0 min"] * 3


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ([], "the other nodes of 16"),
        ([3], "node 3 of 16"),
        ([1, 2, 5], "nodes 1, 2 and 5 of 16"),
        (list(range(1, 16)), "nodes 1, 2, 3, 4, 5, 6, 7, 8 and 7 more of 16"),
    ],
)
def test_names_of_missing_nodes(missing: list[int], text: str) -> None:
    assert waiting._named(missing, 16) == text


@pytest.mark.parametrize("text", [b"{", b"null", b'"x"', b'["a", 99, -1, {}]', b"[2]"])
def test_what_node_0_says_is_data(text: bytes) -> None:
    assert waiting._ranks(text, node(2, 3, 1)) == []
