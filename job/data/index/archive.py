"""Samples inside zip and tar files, read by ranges: nothing is unpacked to disk."""

from __future__ import annotations

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple, cast

import msgspec

from job.data.index.bounded import BoundedFile
from job.data.index.source import is_image
from job.errors import DataError

LABEL_SUFFIXES = (".cls", ".json")
"""Members that label the image of the same name: the WebDataset convention."""
LABEL_KEYS = ("label", "class", "cls")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
STORED, DEFLATED = 0, 8
LARGEST_MEMBER = 1 << 28
"""Bytes of the largest image file that is read, and that a compressed one may expand to."""
LARGEST_LABEL = 1 << 20
"""Bytes of the largest .cls or .json file beside an image, and of the largest header in a tar."""
LONGEST_CLASS = 1000
"""Characters of the longest class name."""
LARGEST_DIRECTORY = 1 << 28
"""Bytes of the largest central directory of a zip file: more than two million members."""
_AROUND_CONTENT = _LOCAL_HEADER.size + 2 * 0xFFFF + 24
"""Bytes of a zip's member beside its content, at most: local header, name, extra field and descriptor."""
_BLOCK = tarfile.BLOCKSIZE
_RECORD = 20 * _BLOCK


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
    bounded = BoundedFile(file, LARGEST_DIRECTORY)
    try:
        archive = zipfile.ZipFile(cast("IO[bytes]", bounded))
        items = sorted(archive.infolist(), key=lambda item: item.header_offset)
    except Exception as error:
        raise _unreadable(uri, bounded, error) from error
    ends = [item.header_offset for item in items[1:]] + [archive.start_dir]
    for item, end in zip(items, ends, strict=True):
        if item.header_offset < 0 or item.header_offset + _LOCAL_HEADER.size > end:
            raise DataError(
                f"{uri} is not a readable archive: member {_printable(item.filename)} overlaps another one or lies "
                "outside of the archive. Pack it again."
            )
        if not item.filename.endswith("/"):  # is_dir() fails for an empty name
            if item.flag_bits & 1 or item.compress_type not in (STORED, DEFLATED):
                raise DataError(
                    f"{uri}: member {_printable(item.filename)} is encrypted or compressed by method "
                    f"{item.compress_type}. Pack it again, stored or deflated."
                )
            size = min(end - item.header_offset, item.compress_size + _AROUND_CONTENT)
            yield Member(_printable(item.filename), item.header_offset, size, item.CRC, None)


def zip_content(raw: bytes, crc: int) -> bytes:
    """The content of a zip's member from its range.

    Raises:
        DataError: it is not what the central directory told of.
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


def list_tar(uri: str, file: IO[bytes]) -> Iterator[Member]:
    """The plain files of a tar archive in their order; links and devices are left out.

    An image's label is taken from the .cls or .json file of the same name next to it, on either side.

    Raises:
        DataError: it is no tar archive, cut short or damaged, or it has sparse members or a label that is none.
    """
    bounded = BoundedFile(file, LARGEST_LABEL)
    try:
        yield from _labelled(uri, bounded)
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(uri, bounded, error) from error


def _unreadable(uri: str, file: BoundedFile, error: Exception) -> Exception:
    if file.failure is not None:
        return file.failure
    return DataError(f"{uri} is not a readable archive: {error or type(error).__name__}. Upload it again.")


def _labelled(uri: str, file: BoundedFile) -> Iterator[Member]:
    group: list[Member] = []
    label: str | None = None
    problem: DataError | None = None  # of a label file; some .json files are not labels, and lie beside no image
    stem = ""
    end = 0
    with tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:") as archive:
        while (item := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else it would remember all of them
            if item.size < 0 or archive.offset <= item.offset:
                raise tarfile.ReadError("a member's size is negative")
            end = archive.offset
            if not item.isfile():
                continue
            name = _printable(item.name)
            if _stem(name) != stem:
                yield from _group(group, label, problem)
                group, label, problem, stem = [], None, None, _stem(name)
            if name.endswith(LABEL_SUFFIXES):
                try:
                    label = _label_of(archive, item) or label
                except DataError as error:
                    problem = DataError(f"{uri}: member {name} {error}. Pack it again.")
            elif item.issparse() and is_image(name):
                raise DataError(f"{uri}: member {name} is a sparse file. Pack it again without --sparse.")
            else:
                group.append(Member(name, item.offset_data, item.size, 0, None))
        yield from _group(group, label, problem)
    _require_end(file, end)


def _group(members: list[Member], label: str | None, problem: DataError | None) -> Iterator[Member]:
    """The members of one stem, labelled."""
    if problem is not None and any(is_image(member.key) for member in members):
        raise problem
    yield from (member._replace(label=label) for member in members)


def _require_end(file: BoundedFile, end: int) -> None:
    """Tell the end of a tar, which is zeros, from a damaged header, at which tarfile ends without an error."""
    file.seek(end)
    if file.read(_RECORD).strip(b"\0"):
        raise tarfile.ReadError(f"bytes that are no header follow member data at byte {end:,}")
    # POSIX ends a tar archive by zeros; tarfile takes a cut between two members for the end.
    size = file.seek(0, 2)
    file.seek(max(size - _BLOCK, 0))
    if file.read().strip(b"\0"):
        raise tarfile.ReadError("it is cut short")


def _printable(name: str) -> str:
    """A member's name with bytes that are not UTF-8 as ``\\xNN``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace") if not name.isascii() else name


def _stem(name: str) -> str:
    """The name up to the first dot of its last part, which members of one sample share."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def _label_of(archive: tarfile.TarFile, item: tarfile.TarInfo) -> str | None:
    """The class in a .cls or .json member.

    Raises:
        DataError: it is too large, sparse, not UTF-8 or no JSON.
    """
    if item.size > LARGEST_LABEL or item.issparse():
        raise DataError(f"is sparse or larger than {LARGEST_LABEL:,} bytes, and no label")
    content = archive.extractfile(item)
    assert content is not None
    return _label(content.read(), is_json=item.name.endswith(".json"))


def _label(content: bytes, *, is_json: bool) -> str | None:
    try:
        if is_json:
            found = msgspec.json.decode(content)
            if isinstance(found, dict):
                found = next((found[key] for key in LABEL_KEYS if key in found), None)
            text = "" if found is None or isinstance(found, (dict, list)) else str(found)
        else:
            text = content.decode().strip()
        text.encode()
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"is no JSON: {error}") from error
    except UnicodeError as error:
        raise DataError("is not UTF-8") from error
    if len(text) > LONGEST_CLASS:
        raise DataError(f"names a class of {len(text):,} characters, more than {LONGEST_CLASS:,}")
    return text or None
