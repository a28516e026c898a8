"""Answers other than 200, as exceptions."""

from __future__ import annotations

RETRY_AFTER = "1"
"""Seconds after which a client should try again: a full queue empties within about one."""


class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: HTTP status.
        message: for the client; it holds nothing of other requests, nor of this machine.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {"retry-after": RETRY_AFTER} if self.status in (429, 503) else {}


class Overloaded(RequestError):
    """More requests than the server has room for at the moment."""

    def __init__(self, message: str) -> None:
        super().__init__(429, message)


class ClientGone(Exception):
    """The client closed the connection: nobody reads the answer."""
