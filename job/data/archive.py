"""Samples inside zip and tar files, read by ranges: nothing is unpacked to disk."""

from __future__ import annotations

import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from job.errors import DataError

LABEL_SUFFIXES = (".cls", ".json")
"""Members that label the image of the same name: the WebDataset convention."""
LABEL_KEYS = ("label", "class", "cls")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
STORED, DEFLATED = 0, 8
LARGEST_MEMBER = 1 << 28
"""Bytes that a compressed member may expand to; an image file of this size is none to train on."""


class Member(NamedTuple):
    """One file in an archive.

    Attributes:
        key: its name.
        offset: first byte to read, in the archive.
        size: bytes to read.
        version: the CRC-32 of a zip's member; 0 in a tar.
        label: the class that a neighbouring .cls or .json file gives it, else None.
    """

    key: str
    offset: int
    size: int
    version: int
    label: str | None


def list_zip(uri: str, file: IO[bytes]) -> Iterator[Member]:
    """The members of a zip file in the order in which they lie there, from its central directory alone.

    The range of a member reaches from its local header to the next one's, so that it can be read
    at once although only the local header tells where the content begins (APPNOTE.TXT 4.3.7).

    Raises:
        DataError: no zip file, or a member that is encrypted or compressed by a rare method.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, EOFError, struct.error) as error:
        raise DataError(f"{uri} is not a readable archive: {error}. Upload it again.") from error
    items = sorted(archive.infolist(), key=lambda item: item.header_offset)
    ends = [item.header_offset for item in items[1:]] + [archive.start_dir]
    for item, end in zip(items, ends, strict=True):
        if not item.is_dir():
            if item.flag_bits & 1 or item.compress_type not in (STORED, DEFLATED):
                raise DataError(
                    f"{uri}: member {item.filename} is encrypted or compressed by method {item.compress_type}. "
                    "Pack it again, stored or deflated."
                )
            yield Member(item.filename, item.header_offset, end - item.header_offset, item.CRC, None)


def zip_content(raw: bytes, crc: int) -> bytes:
    """The content of a zip's member from its range.

    Raises:
        DataError: it is not what the central directory told of.
    """
    try:
        signature, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack_from(raw)
        if signature != b"PK\3\4":
            raise DataError("is not where the archive's directory says")
        begin = _LOCAL_HEADER.size + name_length + extra_length
        # Sizes may follow the content instead of standing in the header: the deflate stream ends by itself.
        inflate = zlib.decompressobj(-15)
        content = inflate.decompress(raw[begin:], LARGEST_MEMBER) if method == DEFLATED else _stored(raw, begin, crc)
        if inflate.unconsumed_tail:
            raise DataError(f"is refused as a decompression bomb: more than {LARGEST_MEMBER:,} bytes")
    except (struct.error, zlib.error) as error:
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


def list_tar(uri: str, file: IO[bytes]) -> Iterator[Member]:
    """The plain files of a tar archive in their order; links and devices are left out.

    An image's label is taken from the .cls or .json file of the same name next to it, on either side.

    Raises:
        DataError: it is no tar archive, or cut short.
    """
    try:
        yield from _labelled(uri, file)
    except tarfile.TarError as error:
        raise DataError(f"{uri} is not a readable archive: {error}. Upload it again.") from error


def _labelled(uri: str, file: IO[bytes]) -> Iterator[Member]:
    group: list[Member] = []
    label: str | None = None
    stem = ""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (item := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else it would remember all of them
            if not item.isfile():
                continue
            if _stem(item.name) != stem:
                yield from (member._replace(label=label) for member in group)
                group, label, stem = [], None, _stem(item.name)
            if item.name.endswith(LABEL_SUFFIXES):
                content = archive.extractfile(item)
                assert content is not None
                label = _label(f"{uri}: member {item.name}", content.read()) or label
            else:
                group.append(Member(item.name, item.offset_data, item.size, 0, None))
        yield from (member._replace(label=label) for member in group)
    # POSIX ends a tar archive by zeros; tarfile takes a cut between two members for the end.
    size = file.seek(0, 2)
    file.seek(max(size - 512, 0))
    if file.read().strip(b"\0"):
        raise tarfile.ReadError("it is cut short")


def _stem(name: str) -> str:
    """The name up to the first dot of its last part, which members of one sample share."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def _label(where: str, content: bytes) -> str | None:
    text = content.decode(errors="replace").strip()
    if not where.endswith(".json"):
        return text or None
    try:
        told = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON: {error}. Pack it again.") from error
    found = next((told[key] for key in LABEL_KEYS if key in told), None) if isinstance(told, dict) else told
    return None if found is None or isinstance(found, (dict, list)) else str(found)
