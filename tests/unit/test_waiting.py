"""What nodes say while they wait for one another."""

from __future__ import annotations

import logging

import pytest
from support import own_messages

from job.cluster import waiting
from job.cluster.waiting import Wait, named, wait_for_address
from job.errors import NodesMissing


def test_a_name_without_address() -> None:
    wait_for_address("localhost", Wait(5))
    with pytest.raises(NodesMissing, match=r"node 0: no-such-node-0\.invalid has no DNS record"):
        wait_for_address("no-such-node-0.invalid", Wait(0))


def test_who_is_missing_is_said_every_minute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    wait = Wait(None, now)
    while wait.seconds < 200:
        wait.report("node 1 of 2")
        now += 0.5
    first, *later = own_messages(caplog)
    assert first == "waiting for node 1 of 2"
    assert later == [f"waiting for node 1 of 2, for {minutes} min" for minutes in (1, 2, 3)]


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
    assert named(missing, 16) == text
