"""A proxy in front of a GCS server that injects faults."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Literal

from aiohttp import ClientSession, ClientTimeout, web
from yarl import URL

Fault = Callable[[web.Request], web.StreamResponse | None]
Damage = Literal["reset", "cut", "stall", "flip"]


class FaultyProxy:
    """Passes requests on to ``backend``, unless :attr:`fault` answers them itself.

    Attributes:
        fault: called with each request, in the proxy's thread; returns an answer, or None to pass the request on.
        damage: what is done to the answer: the connection is reset before it, or cut in the middle of
            it, or nothing comes for a minute and a half, or one bit in the middle of its body is flipped.
        delay: seconds that each request is held up first.
        requests: (method, path with query) of all requests so far.
    """

    def __init__(self, backend: str, port: int) -> None:
        self.backend = backend
        self.url = f"http://127.0.0.1:{port}"
        self.fault: Fault = lambda request: None
        self.damage: Callable[[web.Request], Damage | None] = lambda request: None
        self.delay: Callable[[web.Request], float] = lambda request: 0.0
        self.requests: list[tuple[str, str]] = []
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._started.wait(120)

    def answer_503_for(self, seconds: float, match: str = "") -> None:
        """Answer requests that contain ``match`` with 503 for ``seconds`` after the first of them."""
        began: list[float] = []

        def fault(request: web.Request) -> web.StreamResponse | None:
            if match not in request.path_qs:
                return None
            began.append(time.monotonic())
            return web.Response(status=503) if began[-1] - began[0] < seconds else None

        self.fault = fault

    def stop(self) -> None:
        """Close all connections and end the thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        self._session = ClientSession(timeout=ClientTimeout(60), auto_decompress=False)
        app = web.Application(client_max_size=1 << 32)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        await asyncio.sleep(self.delay(request))
        answer = self.fault(request)
        if answer is not None:
            return answer
        damage = self.damage(request)
        if damage == "stall":
            await asyncio.sleep(90)
        if damage == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        target = URL(self.backend + request.raw_path, encoded=True)
        async with self._session.request(request.method, target, data=body, headers=headers) as response:
            content = await response.read()
            kept = {
                k: v
                for k, v in response.headers.items()
                if k.lower() not in ("content-length", "transfer-encoding", "connection")
            }
            if damage == "cut":
                return await self._cut(request, content)
            if damage == "flip" and content:
                middle = len(content) // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            return web.Response(status=response.status, body=content, headers=kept)

    async def _cut(self, request: web.Request, content: bytes) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await answer.prepare(request)
        await answer.write(content[: len(content) // 2])
        assert request.transport is not None
        request.transport.abort()
        return answer
