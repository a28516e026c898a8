"""Bodies of requests: read with limits on their size, on their time and on what all of them hold in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from job.serve.errors import ClientGone, Overloaded, RequestError
from job.serve.settings import MEGABYTE, Limits


class BodyReader:
    """Reads the bodies of all requests.

    Args:
        limits: sizes and time.

    Attributes:
        pending_bytes: bytes of all requests that are held.
    """

    def __init__(self, limits: Limits) -> None:
        self.most = int(limits.max_body_mb * MEGABYTE)
        self.most_pending = int(limits.max_pending_mb * MEGABYTE)
        self.timeout = limits.timeout
        self.pending_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held until the context ends.

        Raises:
            RequestError: it is too large, compressed, or does not arrive in time.
            Overloaded: the bodies of all requests are too large together.
            ClientGone: the client has closed the connection.
        """
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":  # what is decompressed may be a thousand times as large
            raise RequestError(415, "compressed bodies are not supported: leave out Content-Encoding.")
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdecimal() and (len(length) > 18 or int(length) > self.most):
            raise self._too_large()
        held = 0
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self.timeout):
                    more = True
                    while more:
                        message = await request.receive()
                        if message["type"] == "http.disconnect":
                            raise ClientGone
                        chunk, more = message.get("body", b""), message.get("more_body", False)
                        if held + len(chunk) > self.most:
                            raise self._too_large()
                        if self.pending_bytes + len(chunk) > self.most_pending:
                            raise Overloaded("too much data of other requests is being processed. Try again later.")
                        held += len(chunk)
                        self.pending_bytes += len(chunk)
                        body += chunk
            except TimeoutError:
                raise RequestError(408, f"the body did not arrive within {self.timeout:g} s.") from None
            content = bytes(body)
            body.clear()  # else each body would be in memory twice, and count once
            yield content
        finally:
            self.pending_bytes -= held

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body is larger than {self.most / MEGABYTE:g} MB (--max_body_mb).")
