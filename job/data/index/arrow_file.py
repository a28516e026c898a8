"""Parts of Arrow's file format that pyarrow does not show: whether its record batches are compressed."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b"ARROW1"
_BLOCK = struct.Struct("<qi4xq")
_RECORD_BATCHES = 3
"""Number of the field in the table Footer (https://github.com/apache/arrow/blob/main/format/File.fbs)."""
_HEADER = 2
"""Of the header in the table Message (Message.fbs)."""
_COMPRESSION = 3
"""Of BodyCompression in the table RecordBatch (Message.fbs)."""


def require_uncompressed(path: Path) -> None:
    """Check that no record batch is compressed, so that mapping the file takes no memory.

    Raises:
        ValueError: one is, or the file is no Arrow file.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                if any(_is_compressed(content, offset) for offset in _batches(content)):
                    raise ValueError("its record batches are compressed")
            except (struct.error, IndexError) as error:
                raise ValueError(f"it is no Arrow file ({error})") from error


def _batches(content: mmap.mmap) -> Iterator[int]:
    """Offsets of all record batches, from the footer."""
    size = len(content)
    if content[size - 6 :] != _MAGIC or content[:6] != _MAGIC:
        raise ValueError("it is no Arrow file")
    (length,) = struct.unpack_from("<i", content, size - 10)
    start = size - 10 - length
    if length <= 0 or start < 8:
        raise ValueError("its footer is damaged")
    vector = _field(content, start + _unsigned(content, start), _RECORD_BATCHES)
    if vector:
        count = _unsigned(content, vector)
        if vector + 4 + count * _BLOCK.size > size:
            raise ValueError("its footer is damaged")
        for number in range(count):
            yield _BLOCK.unpack_from(content, vector + 4 + number * _BLOCK.size)[0]


def _is_compressed(content: mmap.mmap, block: int) -> bool:
    # A message begins with 0xFFFFFFFF and its length; before Arrow 0.15 with its length alone.
    start = block + (8 if _unsigned(content, block) == 0xFFFFFFFF else 4)
    header = _field(content, start + _unsigned(content, start), _HEADER)
    return bool(header and _field(content, header, _COMPRESSION))


def _field(content: mmap.mmap, table: int, number: int) -> int:
    """Place of a field that is a table or vector, in a flatbuffers table; 0 where it is absent."""
    vtable = table - struct.unpack_from("<i", content, _checked(content, table))[0]
    (size,) = struct.unpack_from("<H", content, _checked(content, vtable))
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", content, _checked(content, vtable + 4 + 2 * number))
    return table + offset + _unsigned(content, table + offset) if offset else 0


def _unsigned(content: mmap.mmap, place: int) -> int:
    value: int = struct.unpack_from("<I", content, _checked(content, place))[0]
    return value


def _checked(content: mmap.mmap, place: int) -> int:
    if not 0 <= place < len(content):
        raise ValueError("a place in it lies outside of it")
    return place
