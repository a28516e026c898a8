"""The server as a process: signals, exit codes, a rolling restart under load, and its page in a real browser."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fork_server
import httpx
import numpy as np
import pytest
from browser import chromium, needs_chromium
from PIL import Image
from support import COLOURS, environment, fit_here, picture, start, wait_for

import job

pytestmark = pytest.mark.integration

SECONDS = 300
"""Limit of a request and of the end of a process, where the machine is busy."""
PICTURES = [picture(colour, seed) for seed, colour in enumerate(COLOURS.values())]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_here(tmp_path_factory.mktemp("run"), trainer__max_epochs=1)


@dataclass
class Served:
    """A process of the server.

    Attributes:
        process: of the command.
        url: of its socket.
        log: what it wrote.
    """

    process: fork_server.Process | subprocess.Popen[bytes]
    url: str
    log: Path

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/v2/health/ready", trust_env=False).status_code == 200
        return False


@contextlib.contextmanager
def served(folder: Path, *args: object, name: str = "server", ready: bool = True, **variables: str) -> Iterator[Served]:
    log = folder / f"{name}.log"
    with log.open("w") as file:
        process = start("serve", *args, "--port=0", stdout=file, stderr=file, variables=environment(**variables))
    try:
        wait_for(lambda: "listening at" in log.read_text() or process.poll() is not None, 300)
        port = re.search(r"listening at http://\S+:(\d+)", log.read_text())
        assert port, log.read_text()
        server = Served(process, f"http://127.0.0.1:{port[1]}", log)
        if ready:
            wait_for(server.is_ready, 300)
        yield server
    finally:
        process.kill()
        process.wait()


def test_predictions_are_those_of_python_and_the_log_is_json(run_dir: Path, tmp_path: Path) -> None:
    variables = {"JOB_LOG": "json", "AIP_STORAGE_URI": str(run_dir), "AIP_HEALTH_ROUTE": "/ping"}
    with served(tmp_path, "--precision=fp32", "--grace=120", **variables) as server:
        assert httpx.get(f"{server.url}/ping", trust_env=False, timeout=SECONDS).status_code == 200
        body = {"instances": [{"b64": base64.b64encode(content).decode()} for content in PICTURES]}
        answer = httpx.post(f"{server.url}/predict?key=hunter2", json=body, trust_env=False, timeout=SECONDS)
        predictor = job.load(str(run_dir))
        assert answer.headers["x-model-sha256"] == predictor.fingerprint
        for one, other in zip(answer.json()["predictions"], predictor.predict(PICTURES), strict=True):
            assert one["label"] == other.label
            assert one["probabilities"] == pytest.approx(other.probabilities, abs=1e-6)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(SECONDS) == 0
    records = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    (request,) = (record for record in records if record.get("route") == "/predict")
    assert (request["status"], request["client"]) == (200, "127.0.0.1")
    assert "hunter2" not in server.log.read_text()
    assert "SIGINT: finishing" in server.log.read_text()


def test_nothing_is_lost_at_a_rolling_restart(run_dir: Path, tmp_path: Path) -> None:
    """Clients send without a pause, and go to the other server when a connection is refused before they have sent."""
    with (
        served(tmp_path, run_dir, "--drain_delay=1", "--grace=120", "--timeout=120", name="old") as old,
        served(tmp_path, run_dir, "--timeout=120", name="new") as new,
    ):
        stop, answers, lost = threading.Event(), [0, 0], []

        def send(number: int) -> None:
            target = 0
            limits = httpx.Limits(max_keepalive_connections=1)
            with httpx.Client(trust_env=False, timeout=SECONDS, limits=limits) as client:
                while not stop.is_set():
                    try:
                        answer = client.post(f"{(old, new)[target].url}/predict", content=PICTURES[number % 3])
                    except httpx.ConnectError:  # it listens no longer
                        target = 1
                        continue
                    except httpx.HTTPError as error:
                        lost.append(error)
                        continue
                    if answer.status_code != 200:
                        lost.append(answer.text)
                    answers[target] += 1

        threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: answers[0] > 40, 300)
            old.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not old.is_ready())
            assert old.process.wait(SECONDS) == 0, old.log.read_text()
            wait_for(lambda: answers[1] > 40, 300)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not lost
        assert "every request that was accepted has its answer" in old.log.read_text()
        assert "Traceback" not in old.log.read_text()


def test_a_request_that_outlasts_the_grace_is_named(run_dir: Path, tmp_path: Path) -> None:
    with served(tmp_path, run_dir, "--grace=2", "--drain_delay=0", "--timeout=900") as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(SECONDS)
            headers = b"host: x\r\ncontent-length: 1000\r\nexpect: 100-continue\r\n"
            client.sendall(b"POST /predict HTTP/1.1\r\n" + headers + b"\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")  # it waits for the body
            client.sendall(b"abc")
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(SECONDS) == 143  # long before the request's own limit
        assert "1 request(s) were not finished within --grace 2" in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_a_signal_while_the_model_is_loaded_ends_it_at_once(run_dir: Path, tmp_path: Path) -> None:
    with served(tmp_path, run_dir, ready=False) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 0, server.log.read_text()


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    with served(tmp_path, tmp_path / "nothing", ready=False) as server:
        assert server.process.wait(SECONDS) == 2
        assert "Traceback" not in server.log.read_text()
        assert str(tmp_path / "nothing") in server.log.read_text()


@needs_chromium
def test_the_page_in_a_browser(run_dir: Path, tmp_path: Path) -> None:
    """The form, and the answer to it, saved as a page; both are drawn within their policy."""
    with served(tmp_path, run_dir) as server:
        shot = tmp_path / "form.png"
        done = chromium(tmp_path, f"{server.url}/", f"--screenshot={shot}", "--window-size=800,900")
        assert "Content Security Policy" not in done.stderr, done.stderr
        pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("L"), np.float64)
        assert pixels.std() > 5  # not empty
        drawn = chromium(tmp_path, f"{server.url}/", "--dump-dom").stdout
        assert '<input type="file"' in drawn
        assert "/v2/models/model/infer" in drawn
        files = [("image", ("a photograph.jpg", PICTURES[0])), ("image", ("broken.jpg", b"broken"))]
        answer = httpx.post(f"{server.url}/", files=files, trust_env=False, timeout=SECONDS).text
        policy = f'<meta http-equiv="content-security-policy" content="{_policy(server)}">'
        page = tmp_path / "answer.html"
        page.write_text(answer.replace("<head>", f"<head>{policy}"))
        done = chromium(tmp_path, page.as_uri(), f"--screenshot={tmp_path}/answer.png", "--window-size=800,1100")
        assert "Content Security Policy" not in done.stderr.replace("'frame-ancestors'", ""), done.stderr
        assert chromium(tmp_path, page.as_uri(), "--dump-dom").stdout.count("<meter") == 2


def _policy(server: Served) -> str:
    policy = httpx.get(f"{server.url}/", trust_env=False, timeout=SECONDS).headers["content-security-policy"]
    return policy.replace("; frame-ancestors 'none'", "")  # browsers take that one from a header alone
