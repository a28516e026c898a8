"""The headers of a tar file, one after the other, without what lies between them.

Headers of plain files and folders are parsed here, at a tenth of the cost of :mod:`tarfile`, which parses all others:
extended headers (pax, GNU), links, sparse files, base-256 numbers, and whatever is damaged.
"""

from __future__ import annotations

import tarfile
import zlib
from enum import Enum
from typing import IO, NamedTuple, cast

from job.data.index.bounded import READS_AT_THE_END
from job.data.index.ranges import Ranges

LARGEST_HEADER = 1 << 20
"""Bytes of the largest extended header."""
LARGE_HEADER = 1 << 14
"""Bytes of an extended header from which on more than is missing is read."""
BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE
MOST_FIELDS = 1024


class Kind(Enum):
    """What a member is."""

    FILE = "file"
    FOLDER = "folder"
    SPARSE = "sparse file"
    HARD_LINK = "hard link"
    SYMBOLIC_LINK = "symbolic link"
    DEVICE = "device or pipe"


class Header(NamedTuple):
    """One member.

    Attributes:
        name: as the header spells it; bytes that are not UTF-8 as surrogates.
        kind: what it is.
        offset: first byte of its content.
        size: bytes of its content.
        target: name to which a link leads.
    """

    name: str
    kind: Kind
    offset: int
    size: int
    target: str = ""


class TarHeaders:
    """Reads the headers of a tar file in order.

    Args:
        ranges: the file.

    Attributes:
        end: first byte after the last member.
    """

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._global_pax_headers: dict[str, str] = {}
        self._valid_fields: set[bytes] = set()
        self.end = 0

    async def next(self) -> Header | None:
        """The next member; None at the end, or at bytes that are no header.

        Raises:
            tarfile.ReadError: the header is damaged, or the file is cut short.
            ValueError: an extended header is larger than :data:`LARGEST_HEADER`.
        """
        offset, ranges = self.end, self._ranges
        if (block := ranges.held(offset, BLOCK)) is None:
            if offset > ranges.size:
                raise tarfile.ReadError("unexpected end of data")
            block = await ranges.read(offset, BLOCK)
        if self._global_pax_headers or (plain := self._parse_plain(block, offset)) is None:
            return await self._parse_any(offset, block)
        self.end = plain.offset
        if plain.kind is Kind.FILE:
            self.end += -(-plain.size // BLOCK) * BLOCK
        return plain

    async def require_end(self) -> None:
        """See :func:`require_end`."""
        await require_end(self._ranges, self.end)

    def _parse_plain(self, block: bytes, offset: int) -> Header | None:
        """A valid header of a file or folder; None: it may be another one, or none."""
        if len(block) < BLOCK or block[156] not in b"0\x005" or block[124] & 0x80:
            return None
        kind = Kind.FOLDER if block[156] == 0x35 else Kind.FILE
        try:
            if not has_checksum(block):
                return None
            size = _octal(block[124:136])
            _octal(block[136:148])
            self._require_fields(block[100:124] + block[329:345])
        except ValueError:
            return None
        if size < 0:
            return None
        name = _text(block[:100])
        if block[345]:
            name = f"{_text(block[345:500])}/{name}"
        if block[156] == 0 and _text(block[:100]).endswith("/"):
            kind = Kind.FOLDER
        return Header(name.rstrip("/") if kind is Kind.FOLDER else name, kind, offset + BLOCK, size)

    def _require_fields(self, fields: bytes) -> None:
        """Check mode, owner, group and numbers of devices, which most headers of an archive share."""
        if fields not in self._valid_fields:
            for start in range(0, len(fields), 8):
                _octal(fields[start : start + 8])
            if len(self._valid_fields) >= MOST_FIELDS:
                self._valid_fields.clear()
            self._valid_fields.add(fields)

    async def _parse_any(self, offset: int, block: bytes) -> Header | None:
        """The member at ``offset``, with all of its extended headers, of which ``block`` is the first."""
        view = _View(offset, self._ranges.size, block)
        while True:
            view.seek(offset)
            try:
                archive = tarfile.TarFile(
                    fileobj=cast("IO[bytes]", view),
                    mode="r",
                    encoding="utf-8",
                    pax_headers=self._global_pax_headers,
                )
                break
            except _Missing:
                # Each of many small parts would be parsed again for the next one.
                least = 2 * len(view.content) if len(view.content) >= LARGE_HEADER else 0
                view.content = await self._ranges.read(offset, max(view.wanted - offset, least))
        item = archive.firstmember  # type: ignore[attr-defined]
        if item is None:
            return None
        if item.size < 0 or archive.offset <= item.offset:
            raise tarfile.ReadError("a member's size is negative")
        self.end = archive.offset
        return Header(item.name, _kind(item), item.offset_data, item.size, item.linkname)


class _Missing(Exception):
    """A view lacks bytes of the file."""


class _View:
    """The beginning of the file from one place on, as :mod:`tarfile` reads it.

    Attributes:
        content: what it holds so far.
        wanted: end of the last read.
    """

    name = None

    def __init__(self, start: int, size: int, content: bytes) -> None:
        self._start = start
        self._size = size
        self._place = start
        self._reads_at_the_end = 0
        self.content = content
        self.wanted = start

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes.

        Raises:
            _Missing: the content lacks some of them.
            ValueError: it is more than a header may have, or read again and again beyond the end.
        """
        if size > LARGEST_HEADER or self._place + size - self._start > 2 * LARGEST_HEADER:
            raise ValueError(f"a header claims {size:,} bytes, more than {LARGEST_HEADER:,}")
        end = min(self._place + size, self._size)
        if end <= self._place:
            self._reads_at_the_end += 1
            if self._reads_at_the_end > READS_AT_THE_END:
                raise ValueError("it is cut short")
            return b""
        if end > self._start + len(self.content):
            self.wanted = end
            raise _Missing
        content = self.content[self._place - self._start : end - self._start]
        self._place = end
        return content

    def seek(self, offset: int) -> int:
        """Move to ``offset``.

        Raises:
            ValueError: that is before the beginning.
        """
        if offset < self._start:
            raise ValueError("a header points outside of the archive")
        self._place = offset
        return offset

    def tell(self) -> int:
        """The position."""
        return self._place


async def require_end(ranges: Ranges, end: int) -> None:
    """Tell the end of a tar, which is zeros, from a damaged header, at which a walk ends without an error.

    Args:
        ranges: the file.
        end: first byte after the last member.

    Raises:
        tarfile.ReadError: it is damaged or cut short.
    """
    if (await ranges.read(end, RECORD)).strip(b"\0"):
        raise tarfile.ReadError(f"bytes that are no header follow member data at byte {end:,}")
    # POSIX ends a tar archive by zeros; tarfile takes a cut between two members for the end.
    if (await ranges.read(max(ranges.size - BLOCK, 0), BLOCK)).strip(b"\0"):
        raise tarfile.ReadError("it is cut short")


def has_checksum(block: bytes) -> bool:
    """Whether a block has the checksum of a header, the sum of its unsigned bytes, in octal.

    Raises:
        ValueError: the checksum is no octal number.
    """
    # Of at most 257 bytes the lower half of Adler-32 is their sum, plus one.
    total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
    checksum = block[148:156]
    return _octal(checksum) == total - sum(checksum) + 8 * 0x20


def _octal(field: bytes) -> int:
    """A number as :mod:`tarfile` reads it, other than in base 256.

    Raises:
        ValueError: it is none.
    """
    if field[0] & 0x80:
        raise ValueError("base 256")
    if field[-1] in b"\0 ":
        try:
            return int(field[:-1], 8)
        except ValueError:  # blanks or zero bytes
            pass
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _kind(item: tarfile.TarInfo) -> Kind:
    if item.islnk():
        return Kind.HARD_LINK
    if item.issym():
        return Kind.SYMBOLIC_LINK
    if item.issparse():
        return Kind.SPARSE
    if item.isdir():
        return Kind.FOLDER
    # POSIX: unknown types are files.
    return Kind.FILE if item.isfile() or item.type not in tarfile.SUPPORTED_TYPES else Kind.DEVICE
