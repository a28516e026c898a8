"""Clients that are too slow, too many or speak no HTTP; through raw sockets. Also what is relied upon of uvicorn."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Running, Slow, running
from support import picture, wait_for
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from job.serve import connections

GET = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"


@contextlib.contextmanager
def connected(run: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", run.port), timeout=240) as client:
        yield client


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65_536):
            content += chunk
    return content


def status_of(client: socket.socket) -> int:
    """Status of the next answer, which is read completely."""
    content = b""
    while b"\r\n\r\n" not in content or len(content) < _length(content):
        chunk = client.recv(65_536)
        assert chunk, content
        content += chunk
    return int(content.split()[1])


def _length(content: bytes) -> int:
    head = content.partition(b"\r\n\r\n")[0]
    return len(head) + 4 + int(head.lower().partition(b"content-length:")[2].split()[0])


def test_a_header_that_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.5)
    with running() as run:
        for beginning in (b"", b"GET / HT", GET + b"GET / HT"):
            began = time.monotonic()
            with connected(run) as client:
                client.sendall(beginning)
                read_all(client)  # the client's own limit is an error
            assert time.monotonic() - began > 0.3
        with connected(run) as client, pytest.raises(OSError):  # one byte at a time does not prolong it
            for _ in range(200):
                client.sendall(b"G")
                time.sleep(0.05)
        with connected(run) as client:  # an idle one that was answered stays open
            client.sendall(GET)
            assert status_of(client) == 200
            time.sleep(2.5)
            client.sendall(GET)
            assert status_of(client) == 200


def test_a_body_that_does_not_arrive() -> None:
    with running(limits={"timeout": 0.4}) as run, connected(run) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nabc")
        assert status_of(client) == 408  # the client's own limit is an error
        wait_for(lambda: run.server.lifecycle.in_flight == 0)


def test_a_body_that_goes_on_after_its_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 2.0)
    with running(limits={"max_body_mb": 0.01}) as run, connected(run) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert status_of(client) == 413
        with pytest.raises(OSError):
            for _ in range(200):
                client.sendall(bytes(1000))
                time.sleep(0.05)


def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(limits={"timeout": 0.5}) as run:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", run.port))
        with contextlib.suppress(OSError), client:
            client.settimeout(240)
            request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
            for _ in range(500):  # pipelined; the answers fill the buffers
                client.sendall(request)
            wait_for(lambda: not run.server.server_state.connections)
        wait_for(lambda: not run.server.server_state.connections)


def test_a_client_that_sends_but_does_not_read() -> None:
    with running(limits={"timeout": 0.5}) as run:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", run.port))
        connections = run.server.server_state.connections
        wait_for(lambda: connections)
        (connection,) = connections
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

        def is_closed_after_a_request() -> bool:
            with contextlib.suppress(OSError):
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n")
            time.sleep(0.1)  # one request at a time
            return not connections

        with client:
            wait_for(is_closed_after_a_request)


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400),  # TLS
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no host
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 400_000, 400),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 30 + b"\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999\r\n\r\n", 413),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 400),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n", 400),
        (b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"GET http://169.254.169.254/ HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 200),
    ],
)
def test_odd_requests(server: Running, request_text: bytes, status: int) -> None:
    with connected(server) as client:
        client.sendall(request_text)
        with contextlib.suppress(OSError):  # the server may have answered and closed the connection already
            client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    assert int(answer.split()[1]) == status, answer[:200]
    assert server.client.get("/v2/health/ready").status_code == 200


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as run:
        yield run


def test_pipelined_requests(server: Running) -> None:
    with connected(server) as client:
        client.sendall(GET * 3 + b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert read_all(client).count(b"HTTP/1.1 200 OK") == 4


def test_too_many_connections_are_refused_and_idle_ones_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 300.0)  # the connections without a request stay open
    with running(limits={"max_connections": 4}) as run, contextlib.ExitStack() as stack:
        run.client.close()
        wait_for(lambda: not run.server.server_state.connections)
        new = [stack.enter_context(connected(run)) for _ in range(4)]
        wait_for(lambda: len(run.server.server_state.connections) == 4)
        with connected(run) as refused:
            answer = read_all(refused)
            assert answer.startswith(b"HTTP/1.1 503 ")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert f"content-length: {len(body)}".encode() in head
            assert b"retry-after: 1" in head
        new[0].sendall(GET)
        assert status_of(new[0]) == 200
        with connected(run) as client:  # takes the place of the one that is idle
            client.sendall(GET)
            assert status_of(client) == 200
        assert read_all(new[0]) == b""


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_thousands_of_connections_need_little_memory() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 6000:
        pytest.skip("too few files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 6000), hard))
    slow = Slow()
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n"
    try:
        with running(lambda: slow, limits={"max_connections": 1000, "max_pending_mb": 33}) as run:
            before = resident_megabytes()
            clients = []
            for _ in range(2000):
                clients.append(socket.create_connection(("127.0.0.1", run.port), timeout=240))
                clients[-1].setblocking(False)
                with contextlib.suppress(OSError):
                    clients[-1].send(head + bytes(100_000))
            wait_for(lambda: len(run.server.server_state.connections) <= 1001)
            assert run.client.get("/v2/health/live").status_code in (200, 503)
            # 33 MB of bodies, up to 64 KiB that uvicorn reads ahead per connection, and the buffers of both ends.
            assert resident_megabytes() - before < 300
            for client in clients:
                client.close()
            wait_for(lambda: run.server.lifecycle.in_flight == 0)
            assert run.client.post("/predict", content=picture((200, 40, 30), 0)).status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_relied_upon_of_uvicorn() -> None:
    for name in ("connection_made", "connection_lost", "data_received", "on_response_complete", "shutdown"):
        assert callable(getattr(H11Protocol, name))
    assert "response_complete" in RequestResponseCycle.__init__.__code__.co_names
