"""Read the parts of an archive that its listing needs, in as few requests and bytes as its layout allows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

from job.data.index.bounded import BoundedFile

FIRST_READ = 4096
LARGEST_READ = 4 << 20
"""Bytes of one read where an archive is read through."""
REMEMBERED_RUNS = 4
LARGEST_GAP = 32 << 10
"""Bytes between two places that are read, rather than left out, where a read is a request: about what it costs."""
LARGEST_STREAM_GAP = 4 << 20
"""The same where requests cannot be in flight together, so that each one costs its latency."""
LARGEST_DISK_GAP = 4 << 10

T = TypeVar("T")
Fetch = Callable[[int, int, int], Awaitable[bytes]]
"""Returns bytes of an archive: (first byte, how many, how many at least)."""


class Ranges:
    """A window on an archive that moves forward; it learns from each gap how much to read after the next one.

    Small members follow one another: blocks of growing size, up to :data:`LARGEST_READ`, are read. Where members larger
    than ``largest_gap`` are passed over, a read has as many bytes as lay between the last ones, a header for instance,
    or a header, a label and the next header.

    Args:
        fetch: reads the archive.
        size: of the archive in bytes.
        largest_gap: bytes that are rather read than left out.
    """

    def __init__(self, fetch: Fetch, size: int, largest_gap: int) -> None:
        self._fetch = fetch
        self.size = size
        self._largest_gap = largest_gap
        self._start = 0
        self._buffer = b""
        self._run_start = 0
        self._used = 0
        self._runs: list[int] = []
        self._ahead = FIRST_READ

    def held(self, offset: int, size: int) -> bytes | None:
        """``size`` bytes from ``offset`` on if the window holds them, else None."""
        first, end = offset - self._start, offset + size
        if first < 0 or end > self._start + len(self._buffer):
            return None
        if end > self._used:
            self._used = end
        return self._buffer[first : first + size]

    async def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on, fewer at the end of the archive."""
        size = max(min(size, self.size - offset), 0)
        if offset < self._start or not size:  # the target of a link
            return await self._fetch(offset, size, size) if size else b""
        if offset + size > self._start + len(self._buffer):
            await self._advance(offset, offset + size)
        content = self.held(offset, size)
        assert content is not None
        return content

    async def _advance(self, offset: int, end: int) -> None:
        """Move the window, so that it holds all from ``offset`` to ``end``."""
        known = self._start + len(self._buffer)
        if offset - known > self._largest_gap:
            if known:
                self._runs = [*self._runs[1 - REMEMBERED_RUNS :], self._used - self._run_start]
            self._run_start, self._ahead = offset, max(self._runs, default=FIRST_READ)
            self._start, self._buffer = offset, b""
            known = offset
        elif known:
            self._ahead = min(2 * self._ahead, LARGEST_READ)
        content = await self._fetch(known, min(max(end - known, self._ahead), self.size - known), end - known)
        if len(content) < end - known:
            raise ValueError(f"it ends at byte {known + len(content):,}, not {self.size:,} as when it was looked up")
        self._buffer = self._buffer[max(offset - self._start, 0) :] + content
        self._start = known + len(content) - len(self._buffer)


def fetch_from(file: BoundedFile) -> Fetch:
    """The fetch function of an open file, which never waits."""

    async def fetch(offset: int, size: int, least: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return fetch


def run_without_waiting(results: AsyncIterator[T]) -> Iterator[T]:
    """What an asynchronous iterator yields that awaits nothing that waits, without an event loop."""
    while True:
        step = results.__anext__().__await__()
        try:
            next(step)
        except StopIteration as finished:
            yield finished.value
        except StopAsyncIteration:
            return
        else:
            raise AssertionError("the iterator waits")
