"""A proxy in front of a GCS server, which misbehaves on request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from aiohttp import ClientSession, ClientTimeout, web

Fault = Callable[[web.Request], web.StreamResponse | None]


class FaultyProxy:
    """Passes requests on to ``backend``, unless :attr:`fault` answers them itself.

    Attributes:
        fault: called with each request, in the proxy's thread; returns an answer, or None to pass the request on.
        requests: (method, path with query) of all requests so far.
    """

    def __init__(self, backend: str, port: int) -> None:
        self.backend = backend
        self.url = f"http://127.0.0.1:{port}"
        self.fault: Fault = lambda request: None
        self.requests: list[tuple[str, str]] = []
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        assert self._started.wait(30)

    def answer_503_for(self, seconds: float, match: str = "") -> None:
        """From the first request that contains ``match`` on, answer all such ones with 503 for a while."""
        began: list[float] = []

        def fault(request: web.Request) -> web.StreamResponse | None:
            if match not in request.path_qs:
                return None
            began.append(time.monotonic())
            return web.Response(status=503) if began[-1] - began[0] < seconds else None

        self.fault = fault

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        self._session = ClientSession(timeout=ClientTimeout(60), auto_decompress=False)
        app = web.Application(client_max_size=1 << 32)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self._port).start()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        body = await request.read()
        request["body"] = body
        answer = self.fault(request)
        if answer is not None:
            return answer
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        url = self.backend + request.raw_path
        async with self._session.request(request.method, _raw(url), data=body, headers=headers) as response:
            content = await response.read()
            kept = {
                k: v
                for k, v in response.headers.items()
                if k.lower() not in ("content-length", "transfer-encoding", "connection")
            }
            return web.Response(status=response.status, body=content, headers=kept)


def _raw(url: str) -> object:
    from yarl import URL

    return URL(url, encoded=True)
