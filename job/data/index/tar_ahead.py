"""Read the headers of a large tar file at several places at once.

Each header says where the next one lies, so that a walk along them waits for one request after the other. A tar file
has no table of contents, but headers can be recognised: by their magic and checksum, at multiples of 512 bytes. So
further walks begin in the middle of the file, ahead of the first one, which finds what they have read. What looks like
a header and is none, in a tar file within the tar file for instance, costs some requests: the first walk never comes
there.
"""

from __future__ import annotations

import asyncio
import contextlib

from job.data.index.ranges import LARGEST_GAP, Fetch, Ranges
from job.data.index.tar_headers import BLOCK, TarHeaders, has_checksum

SEGMENT = 32 << 20
"""Bytes of a file that one walk passes over; to find its first header takes about the bytes of a member."""
SCAN = 32 << 10
"""Bytes that are searched for a header at once."""
LONGEST_SCAN = 1 << 20
MOST_HELD = 1 << 20
"""Bytes of headers of one segment that are held until the first walk comes there."""
LEAST_GAPS = 4
"""Gaps after which the file counts as one that is worth more walks: of small members all is read, one block after
another."""


class _Segment:
    """One walk ahead of the first one.

    Attributes:
        chunks: what was read, by first byte.
        position: first byte that it has yet to read.
        advanced: set after each read.
        task: the walk.
    """

    def __init__(self, start: int) -> None:
        self.chunks: dict[int, bytes] = {}
        self.held = 0
        self.position = start
        self.advanced = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        return self.task is not None and not self.task.done()


class WalksAhead:
    """Walks along the headers of a tar file ahead of the one that asks; a context manager within an event loop.

    Args:
        fetch: reads the file.
        size: bytes of the file.
        walks: how many there may be.
    """

    def __init__(self, fetch: Fetch, size: int, walks: int) -> None:
        self._fetch = fetch
        self._size = size
        self._walks = walks
        self._segments: dict[int, _Segment] = {}
        self._begun = 0
        self._gaps = 0
        self._end = 0

    async def __aenter__(self) -> WalksAhead:
        return self

    async def __aexit__(self, *error: object) -> None:
        for segment in self._segments.values():
            if segment.task is not None:
                segment.task.cancel()

    async def fetch(self, offset: int, size: int, least: int) -> bytes:
        """The fetch function of the first walk."""
        self._gaps = self._gaps + 1 if offset > self._end else 0
        number = offset // SEGMENT
        if self._gaps >= LEAST_GAPS or self._begun:
            self._begin(number)
        for place in (number, number - 1):
            if (segment := self._segments.get(place)) is None:
                continue
            while offset not in segment.chunks and segment.is_running and segment.position <= offset:
                segment.advanced.clear()
                await segment.advanced.wait()
            if len(content := segment.chunks.pop(offset, b"")) >= least:
                self._end = offset + len(content)
                return content
        content = await self._fetch(offset, size, least)
        self._end = offset + len(content)
        return content

    def _begin(self, number: int) -> None:
        """Begin walks of the segments that follow one, and drop those before."""
        for passed in [each for each in self._segments if each < number - 1]:
            if (task := self._segments.pop(passed).task) is not None:
                task.cancel()
        self._begun = max(self._begun, number + 1)
        last = min(number + self._walks, -(-self._size // SEGMENT))
        for each in range(self._begun, last):
            segment = _Segment(each * SEGMENT)
            self._segments[each] = segment
            segment.task = asyncio.get_running_loop().create_task(self._walk(segment, each))
        self._begun = max(self._begun, last)

    async def _walk(self, segment: _Segment, number: int) -> None:
        # A failure is the first walk's to report, if it comes there.
        with contextlib.suppress(Exception):
            await self._walk_from_first_header(segment, (number + 1) * SEGMENT)
        segment.advanced.set()

    async def _walk_from_first_header(self, segment: _Segment, end: int) -> None:
        first = await self._first_header(segment.position)
        if first is None:
            return

        async def fetch(offset: int, size: int, least: int) -> bytes:
            segment.position = offset
            content = await self._fetch(offset, size, least)
            segment.chunks[offset] = content
            segment.held += len(content)
            segment.position = offset + len(content)
            segment.advanced.set()
            return content

        headers = TarHeaders(Ranges(fetch, self._size, LARGEST_GAP))
        headers.end = first
        while headers.end < end and segment.held < MOST_HELD and await headers.next() is not None:
            pass

    async def _first_header(self, start: int) -> int | None:
        for offset in range(start, min(start + LONGEST_SCAN, self._size), SCAN):
            size = min(SCAN, self._size - offset)
            content = await self._fetch(offset, size, size)
            for place in range(0, len(content) - BLOCK + 1, BLOCK):
                if content[place + 257 : place + 262] == b"ustar":
                    with contextlib.suppress(ValueError):
                        if has_checksum(content[place : place + BLOCK]):
                            return offset + place
        return None
