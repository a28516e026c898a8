"""A server in this process, with a tiny network of random weights."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from support import wait_for

from job.model.classifier import from_spec
from job.predict.predictor import Prediction, Predictor
from job.serve.connections import Server
from job.serve.server import build_server, listen
from job.serve.settings import Limits, Settings

SIDE = 32


def tiny_predictor(classes: tuple[str, ...] = ("blue", "red", "green"), task: str = "classification") -> Predictor:
    spec: dict[str, Any] = {
        "backbone": "timm/test_resnet",
        "classes": list(classes),
        "hidden": [8],
        "image_size": SIDE,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        **({"format": 2, "task": task} if task != "classification" else {"format": 1}),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Predictor(from_spec(spec), "squash", fingerprint="0123456789abcdef")


class Slow:
    """A predictor whose batches wait until :attr:`go` is set, or raise :attr:`error`."""

    def __init__(self) -> None:
        self.inner = tiny_predictor()
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def predict_batch(self, images: torch.Tensor) -> list[Prediction]:
        self.batches.append(len(images))
        assert self.go.wait(300)
        if self.error is not None:
            raise self.error
        return self.inner.predict_batch(images)


@dataclass
class Running:
    """A server that listens.

    Attributes:
        server: the server.
        loop: of its thread.
        port: of its socket.
        client: of HTTP.
        thread: that it runs in.
    """

    server: Server
    loop: asyncio.AbstractEventLoop
    port: int
    client: httpx.Client
    thread: threading.Thread

    def drain(self) -> None:
        """What a signal does."""
        self.loop.call_soon_threadsafe(self.server.lifecycle.drain)

    def metric(self, name: str, **labels: str) -> float:
        value = self.server.lifecycle.batcher.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value


@contextlib.contextmanager
def running(
    load: Callable[[], Any] = tiny_predictor,
    *,
    ready: bool = True,
    limits: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """A server in a thread, which drains at the end of the context."""
    # The defaults would end what a loaded machine has not finished.
    accepted = Limits(**{"timeout": 300.0, **(limits or {})})
    chosen = Settings(host="127.0.0.1", port=0, limits=accepted, **{"drain_delay": 0.0, "grace": 300.0, **settings})
    started: list[tuple[Server, asyncio.AbstractEventLoop]] = []
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]

    async def serve() -> None:
        server = build_server(load, chosen)
        server.lifecycle.batcher.start()
        started.append((server, asyncio.get_running_loop()))
        await server.serve([listener])
        server.lifecycle.batcher.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="test-server", daemon=True)
    thread.start()
    wait_for(lambda: started and started[0][0].started)
    server, loop = started[0]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=240, trust_env=False) as client:
        run = Running(server, loop, port, client, thread)
        if ready:
            wait_for(lambda: server.lifecycle.is_ready)
        try:
            yield run
        finally:
            if thread.is_alive():
                with contextlib.suppress(RuntimeError):  # it has just ended
                    run.drain()
            thread.join(240)
            assert not thread.is_alive()
