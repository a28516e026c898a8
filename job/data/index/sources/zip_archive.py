"""Zip files: members are found by the central directory alone."""

from __future__ import annotations

import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, cast

from job.data.index.bounded import LARGEST_MEMBER, BoundedFile
from job.data.index.left_out import LeftOut
from job.data.index.names import printable
from job.data.index.sources.archive import LINKS_OUTSIDE, Archive, Member, unreadable
from job.data.index.sources.base import LONGEST_KEY, is_image
from job.errors import DataError

STORED, DEFLATED = 0, 8
LARGEST_DIRECTORY = 1 << 28
"""Bytes of the largest central directory of a zip file: more than two million members."""
MOST_LINKS = 1 << 16
"""Symbolic links whose targets are read, each from its place in the archive."""
LONGEST_CHAIN = 40
"""Links from one to the next, as Linux follows them."""
_UTF8 = 0x800
"""Flag of names in UTF-8."""
_SIZE_FOLLOWS = 0x8
"""Flag of sizes that follow the content."""
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_AROUND_CONTENT = _LOCAL_HEADER.size + 2 * 0xFFFF + 24
"""Bytes of a zip's member beside its content, at most: local header, name, extra field and descriptor."""


class Zip(Archive):
    """A zip file, stored or deflated."""

    name = "zip"
    suffixes = (".zip",)
    is_packed = True
    has_member_checksums = True

    def members(self, uri: str, file: IO[bytes], left_out: LeftOut) -> Iterator[Member]:
        """See :func:`list_zip`."""
        return list_zip(uri, file, left_out)

    def unpack(self, raw: bytes, version: int) -> bytes:
        """See :func:`zip_content`."""
        return zip_content(raw, version)


def list_zip(uri: str, file: IO[bytes], left_out: LeftOut | None = None) -> Iterator[Member]:
    """The members of a zip file in the order in which they lie there, from its central directory alone.

    The range of a member reaches from its local header to the next one's, so that it can be read
    at once although only the local header tells where the content begins (APPNOTE.TXT 4.3.7).
    A symbolic link to a file of the archive is that file under another name; other links are left out.

    Raises:
        DataError: no zip file, or an image that is encrypted or compressed by a rare method.
    """
    bounded = BoundedFile(file, LARGEST_DIRECTORY)
    left_out = left_out or LeftOut()
    try:
        archive = zipfile.ZipFile(cast("IO[bytes]", bounded))
        items = sorted(archive.infolist(), key=lambda item: item.header_offset)
    except Exception as error:
        raise unreadable(uri, bounded, error) from error
    ends = [item.header_offset for item in items[1:]] + [archive.start_dir]
    links: list[zipfile.ZipInfo] = []
    for item, end in zip(items, ends, strict=True):
        if item.header_offset < 0 or item.header_offset + _LOCAL_HEADER.size > end:
            raise DataError(
                f"{uri} is not a readable archive: member {_name(item)} overlaps another one or lies "
                "outside of the archive. Pack it again."
            )
        if item.external_attr >> 16 and stat.S_ISLNK(item.external_attr >> 16):
            links.append(item)
        elif not item.filename.endswith("/"):  # is_dir() fails for an empty name
            if reason := _unsupported(item):
                if is_image(_name(item)):
                    raise DataError(f"{uri}: member {_name(item)} is {reason}. Pack it again, stored or deflated.")
                left_out.add("encrypted files and rare compressions", _name(item))
                continue
            yield _member(item, end, _name(item))
    if links:
        items_by_name = {item.filename: (item, end) for item, end in zip(items, ends, strict=True)}
        targets = _link_targets(uri, archive, bounded, links)
        yield from _linked(uri, links, targets, items_by_name, left_out)


def _member(item: zipfile.ZipInfo, end: int, name: str) -> Member:
    size = min(end - item.header_offset, item.compress_size + _AROUND_CONTENT)
    return Member(name, item.header_offset, size, item.CRC, None)


def _unsupported(item: zipfile.ZipInfo) -> str | None:
    if item.flag_bits & 1 or item.compress_type not in (STORED, DEFLATED):
        return f"encrypted or compressed by method {item.compress_type}"
    return None


def _name(item: zipfile.ZipInfo) -> str:
    """A member's name; macOS writes UTF-8 without saying so."""
    if item.filename.isascii() or item.flag_bits & _UTF8:
        return printable(item.filename)
    try:
        return item.filename.encode("cp437").decode()
    except UnicodeError:
        return printable(item.filename)


def _link_targets(
    uri: str, archive: zipfile.ZipFile, file: BoundedFile, links: list[zipfile.ZipInfo]
) -> dict[str, str | None]:
    """Names of the targets of symbolic links, by the names of the links; None for those outside of the archive."""
    if len(links) > MOST_LINKS:
        raise DataError(f"{uri} has {len(links):,} symbolic links, at most {MOST_LINKS:,} are read. Pack it again.")
    targets: dict[str, str | None] = {}
    for link in links:
        targets[link.filename] = None
        if link.file_size > LONGEST_KEY or link.compress_size > 2 * LONGEST_KEY or _unsupported(link):
            continue
        try:
            with archive.open(link) as content:
                target = content.read(LONGEST_KEY).decode()
        except Exception as error:
            if file.failure is not None:
                raise file.failure from error
            continue  # a damaged link leads nowhere
        path = posixpath.normpath(posixpath.join(posixpath.dirname(link.filename), target))
        targets[link.filename] = None if path.startswith(("/", "../")) else path
    return targets


def _linked(
    uri: str,
    links: list[zipfile.ZipInfo],
    targets: dict[str, str | None],
    items: dict[str, tuple[zipfile.ZipInfo, int]],
    left_out: LeftOut,
) -> Iterator[Member]:
    for link in links:
        target, steps = targets[link.filename], 0
        while target in targets and steps < LONGEST_CHAIN:
            target, steps = targets[target], steps + 1
        if target is None or target not in items or target in targets:
            left_out.add(LINKS_OUTSIDE, _name(link))
            continue
        item, end = items[target]
        if (reason := _unsupported(item)) and is_image(_name(link)):
            raise DataError(f"{uri}: member {_name(item)} is {reason}. Pack it again, stored or deflated.")
        yield _member(item, end, _name(link))


def zip_content(raw: bytes, crc: int) -> bytes:
    """The content of a zip's member from its range.

    Raises:
        DataError: it is not what the central directory describes.
    """
    try:
        signature, _, _, method, _, _, _, _, size, name_length, extra_length = _LOCAL_HEADER.unpack_from(raw)
        if signature != b"PK\3\4":
            raise DataError("is not where the archive's directory says")
        begin = _LOCAL_HEADER.size + name_length + extra_length
        if method == DEFLATED:
            # Sizes may follow the content instead of standing in the header: the deflate stream ends by itself.
            has_size = 0 < size < 0xFFFFFFFF
            inflate = zlib.decompressobj(-15)
            limit = min(size, LARGEST_MEMBER) if has_size else LARGEST_MEMBER
            content = inflate.decompress(memoryview(raw)[begin:], limit + 1)
            if len(content) > limit or (has_size and size > LARGEST_MEMBER):
                raise DataError(f"is refused as a decompression bomb: more than {limit:,} bytes")
        else:
            content = _stored(raw, begin, crc)
    except (struct.error, zlib.error, MemoryError) as error:
        raise DataError(f"is damaged in the archive: {error}") from error
    if zlib.crc32(content) != crc:
        raise DataError("is damaged in the archive: its CRC does not match")
    return content


def _stored(raw: bytes, begin: int, crc: int) -> bytes:
    header = _LOCAL_HEADER.unpack_from(raw)
    flags, size = header[2], header[8]
    if 0 < size < 0xFFFFFFFF or (size == 0 and not flags & _SIZE_FOLLOWS):
        return raw[begin : begin + size]
    # Without a size in the header a descriptor follows the content: signature (optional), CRC, two sizes.
    for descriptor in (0, 12, 16, 20, 24):
        content = raw[begin : len(raw) - descriptor]
        if zlib.crc32(content) == crc:
            return content
    # Other bytes may follow in turn, where members were replaced.
    for place in _places(raw, struct.pack("<L", crc), begin):
        for end in (place - 4, place):
            if raw[place + 4 : place + 8] == struct.pack("<L", (end - begin) & 0xFFFFFFFF):
                return raw[begin:end]
    return raw[begin:]


def _places(raw: bytes, part: bytes, start: int) -> Iterator[int]:
    while (start := raw.find(part, start)) >= 0:
        yield start
        start += 1
