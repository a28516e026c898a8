"""Index files that other tools leave beside tar shards: those of NVIDIA DALI (``wds2idx``).

``s-000.idx`` names the files in ``s-000.tar``: a line ``v1.2 SAMPLES``, then for each sample a line of suffix, offset,
size and name of its files. So labels are read at once, and headers hardly at all. It may be out of date: where it does
not fit the shard, it is not used. What fits is that the files follow one another without a gap up to the end of the
shard, and that the headers of all labels and of some other files are those that it says.

WebDataset's own are of no use: ``shardindex.json`` has no offsets, and a ``.index`` file is a pickle, which is code.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import tarfile
from dataclasses import dataclass

from job import storage
from job.data.index.ranges import LARGEST_GAP, Fetch, Ranges
from job.data.index.sources.base import LONGEST_KEY
from job.data.index.sources.webdataset import is_label
from job.data.index.tar_headers import BLOCK, RECORD, Header, Kind, TarHeaders, require_end
from job.errors import StorageError, StorageOutage

log = logging.getLogger(__name__)

LARGEST_INDEX = 64 << 20
"""Bytes of an index file that is still read."""
HEADERS_CHECKED = 16
"""Headers of files other than labels that are compared."""
REQUESTS = 16
"""Requests of one shard in flight."""
MOST_HELD = 4 << 20
"""Bytes of labels of one shard that are held; hundreds of shards are listed at once. Others are read again."""


def side_index_uri(uri: str) -> str:
    """Where the index file of a shard is: its name up to the first dot, as ``wds2idx`` does it."""
    folder, name = storage.split(uri)
    return storage.join(folder, f"{name.split('.', 1)[0]}.idx")


@dataclass
class IndexedHeaders:
    """The members of a shard as its index file names them; has the methods of :class:`~.tar_headers.TarHeaders`.

    Attributes:
        entries: the members.
        ranges: content of the shard; holds labels.
    """

    entries: list[Header]
    ranges: Ranges
    _place: int = 0

    async def next(self) -> Header | None:
        """The next member; None at the end."""
        self._place += 1
        return self.entries[self._place - 1] if self._place <= len(self.entries) else None

    async def require_end(self) -> None:
        """Check that zeros follow the last member.

        Raises:
            tarfile.ReadError: something else does.
        """
        await require_end(self.ranges, _end(self.entries[-1]))


def parse_index(content: bytes) -> list[Header]:
    """The files that an index file names.

    Raises:
        ValueError: it is none, or leaves a gap in which other members may lie.
    """
    lines = content.decode("ascii").splitlines()
    if not lines or lines[0].split()[:1] != ["v1.2"]:
        raise ValueError("its first line is not v1.2 and a number")
    entries = []
    for line in lines[1:]:
        words = line.split(" ")
        if len(words) % 4:
            raise ValueError("a line has not four words per file")
        for offset, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True):
            # GNU tar spells other names with backslashes.
            if not name or len(name) > LONGEST_KEY or not name.isprintable() or "\\" in name:
                raise ValueError("a name has unusual characters")
            entries.append(Header(name, Kind.FILE, int(offset), int(size)))
    if not entries or entries[0].offset != BLOCK or any(entry.size < 0 for entry in entries):
        raise ValueError("it does not name the first file")
    for before, after in itertools.pairwise(entries):
        if after.offset != _end(before) + BLOCK:
            raise ValueError(f"there is more than {after.name} behind {before.name}")
    return entries


async def read_side_index(uri: str, fetch: Fetch, size: int) -> IndexedHeaders | None:
    """The members of a shard by the index file beside it; None where there is none that fits.

    Args:
        uri: of the shard.
        fetch: reads the shard.
        size: bytes of the shard.

    Raises:
        StorageOutage: it cannot be read now.
    """
    index_uri = side_index_uri(uri)
    reader = storage.Reader(index_uri)
    try:
        if int((await reader.fetch_info("")).get("size") or 0) > LARGEST_INDEX:
            raise ValueError(f"it has more than {LARGEST_INDEX:,} bytes")
        entries = parse_index(await reader.fetch("", 0, LARGEST_INDEX))
        return IndexedHeaders(entries, await _checked(entries, fetch, size))
    except StorageOutage:
        raise
    except StorageError:
        return None
    except (ValueError, tarfile.ReadError) as error:
        log.warning("%s is not used, and the headers of %s are read: %s", index_uri, uri, error)
        return None


async def _checked(entries: list[Header], fetch: Fetch, size: int) -> Ranges:
    """The shard's content with its labels in memory, after the check of their headers and of some others."""
    if _end(entries[-1]) > size or size - _end(entries[-1]) > 2 * RECORD:
        raise ValueError("it is of a shard of another size")
    labels = [entry for entry in entries if is_label(entry.name) and entry.size <= LARGEST_GAP]
    others = [entry for entry in entries if not is_label(entry.name)]
    chosen = others[:: max(len(others) // HEADERS_CHECKED, 1)] + others[-1:]
    contents: dict[int, bytes] = {}
    held = 0
    slots = asyncio.Semaphore(REQUESTS)

    async def check(entry: Header, content_bytes: int) -> None:
        nonlocal held
        start, length = entry.offset - BLOCK, BLOCK + content_bytes
        async with slots:
            block = await fetch(start, length, length)
        ranges = Ranges(_held(start, block), size, 0)
        headers = TarHeaders(ranges)
        headers.end = start
        if await headers.next() != entry:
            raise ValueError(f"{entry.name} does not lie at byte {entry.offset:,}")
        if content_bytes and held + content_bytes <= MOST_HELD:
            held += content_bytes
            contents[entry.offset] = block[BLOCK:]

    checks = [
        *(asyncio.ensure_future(check(entry, entry.size)) for entry in labels),
        *(asyncio.ensure_future(check(entry, 0)) for entry in chosen),
    ]
    try:
        await asyncio.gather(*checks)
    finally:
        for each in checks:  # after a failure gather lets the others go on
            each.cancel()

    async def fetch_held(offset: int, size: int, least: int) -> bytes:
        content = contents.get(offset, b"")
        return content if len(content) >= least else await fetch(offset, size, least)

    return Ranges(fetch_held, size, 0)


def _held(start: int, content: bytes) -> Fetch:
    async def fetch(offset: int, size: int, least: int) -> bytes:
        return content[offset - start : offset - start + size]

    return fetch


def _end(entry: Header) -> int:
    """First byte after the content of a member."""
    return entry.offset + -(-entry.size // BLOCK) * BLOCK
