"""Zip files: members are found by the central directory alone."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, cast

from job.data.index.bounded import LARGEST_MEMBER, BoundedFile
from job.data.index.sources.archive import Archive, Member, printable, unreadable
from job.errors import DataError

STORED, DEFLATED = 0, 8
LARGEST_DIRECTORY = 1 << 28
"""Bytes of the largest central directory of a zip file: more than two million members."""
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_AROUND_CONTENT = _LOCAL_HEADER.size + 2 * 0xFFFF + 24
"""Bytes of a zip's member beside its content, at most: local header, name, extra field and descriptor."""


class Zip(Archive):
    """A zip file, stored or deflated."""

    name = "zip"
    suffixes = (".zip",)
    is_packed = True
    has_member_checksums = True

    def members(self, uri: str, file: IO[bytes]) -> Iterator[Member]:
        """See :func:`list_zip`."""
        return list_zip(uri, file)

    def unpack(self, raw: bytes, version: int) -> bytes:
        """See :func:`zip_content`."""
        return zip_content(raw, version)


def list_zip(uri: str, file: IO[bytes]) -> Iterator[Member]:
    """The members of a zip file in the order in which they lie there, from its central directory alone.

    The range of a member reaches from its local header to the next one's, so that it can be read
    at once although only the local header tells where the content begins (APPNOTE.TXT 4.3.7).

    Raises:
        DataError: no zip file, or a member that is encrypted or compressed by a rare method.
    """
    bounded = BoundedFile(file, LARGEST_DIRECTORY)
    try:
        archive = zipfile.ZipFile(cast("IO[bytes]", bounded))
        items = sorted(archive.infolist(), key=lambda item: item.header_offset)
    except Exception as error:
        raise unreadable(uri, bounded, error) from error
    ends = [item.header_offset for item in items[1:]] + [archive.start_dir]
    for item, end in zip(items, ends, strict=True):
        if item.header_offset < 0 or item.header_offset + _LOCAL_HEADER.size > end:
            raise DataError(
                f"{uri} is not a readable archive: member {printable(item.filename)} overlaps another one or lies "
                "outside of the archive. Pack it again."
            )
        if not item.filename.endswith("/"):  # is_dir() fails for an empty name
            if item.flag_bits & 1 or item.compress_type not in (STORED, DEFLATED):
                raise DataError(
                    f"{uri}: member {printable(item.filename)} is encrypted or compressed by method "
                    f"{item.compress_type}. Pack it again, stored or deflated."
                )
            size = min(end - item.header_offset, item.compress_size + _AROUND_CONTENT)
            yield Member(printable(item.filename), item.header_offset, size, item.CRC, None)


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
            known = 0 < size < 0xFFFFFFFF
            inflate = zlib.decompressobj(-15)
            limit = min(size, LARGEST_MEMBER) if known else LARGEST_MEMBER
            content = inflate.decompress(memoryview(raw)[begin:], limit + 1)
            if len(content) > limit or (known and size > LARGEST_MEMBER):
                raise DataError(f"is refused as a decompression bomb: more than {limit:,} bytes")
        else:
            content = _stored(raw, begin, crc)
    except (struct.error, zlib.error, MemoryError) as error:
        raise DataError(f"is damaged in the archive: {error}") from error
    if zlib.crc32(content) != crc:
        raise DataError("is damaged in the archive: its CRC does not match")
    return content


def _stored(raw: bytes, begin: int, crc: int) -> bytes:
    size: int = _LOCAL_HEADER.unpack_from(raw)[8]
    if 0 < size < 0xFFFFFFFF:
        return raw[begin : begin + size]
    # Without a size in the header a descriptor follows the content: signature (optional), CRC, two sizes.
    for descriptor in (0, 12, 16, 20, 24):
        content = raw[begin : len(raw) - descriptor]
        if zlib.crc32(content) == crc:
            return content
    return raw[begin:]
