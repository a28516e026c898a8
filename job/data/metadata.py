"""Image metadata: the EXIF orientation, and copies of image files without their metadata."""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

ORIENTATION_TAG = 0x0112
_EXIF = b"Exif\0\0"
_INTEGERS = {1: "B", 3: "H", 4: "I"}
"""Formats of struct for EXIF's types of unsigned integers."""
_XMP_TAG = b"tiff:Orientation"
_XMP_ORIENTATION = re.compile(_XMP_TAG + rb'(?:="|>)([1-8])')
_SCAN_MARKER = b"\xff\xda"
_APP0, _APP1, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND")
_PNG_EXIF = b"eXIf"
_WEBP_METADATA_CHUNKS = (b"XMP ", b"ICCP")
_WEBP_METADATA_FLAGS = 0x20 | 0x04
_HEIF_EXIF_ITEM = re.compile(rb"(infe\x02.{7})Exif", re.DOTALL)
"""Entry of the EXIF data in the table of items of an AVIF or HEIC file."""
_TIFF_PIXEL_TAGS = frozenset(
    itertools.chain(
        (254, *range(256, 260), 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326)),
        (*range(332, 342), 347, *range(512, 522), *range(529, 533)),  # inks and samples, JPEG, YCbCr
    )
)
"""Tags that say how the pixels are stored, and the orientation."""


class _Segment(NamedTuple):
    """One marker segment of a JPEG: ``content[start:end]`` with its marker, ``content[payload:end]`` without."""

    marker: int
    start: int
    payload: int
    end: int


def jpeg_orientation(content: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8; 1 where there is none or it cannot be read."""
    from_xmp, header_end = 1, content.find(_SCAN_MARKER)
    if content.find(_EXIF, 0, header_end) < 0 and content.find(_XMP_TAG, 0, header_end) < 0:
        return 1
    for segment in _jpeg_segments(content):
        if segment.marker == _APP1:
            if content.startswith(_EXIF, segment.payload):
                if value := _exif_orientation(content[segment.payload : segment.end]):
                    return value
            elif match := _XMP_ORIENTATION.search(content, segment.payload, segment.end):
                from_xmp = int(match[1])
    return from_xmp


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is loaded, 1 to 8; 1 where there is none or it cannot be read."""
    raw = image.info.get("exif")
    if isinstance(raw, bytes) and (value := _exif_orientation(raw)):
        return value
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # malformed metadata does not hide the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _exif_orientation(payload: bytes) -> int | None:
    """The orientation's value alone: Pillow gives up the whole directory for one malformed tag."""
    content = payload.removeprefix(_EXIF).removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", content, 4)
        (count,) = struct.unpack_from(order + "H", content, directory)
        for place in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", content, place)
            if tag == ORIENTATION_TAG and kind in _INTEGERS and values == 1:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], content, place + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass  # the directory lies outside of the data, or ends there
    return None


def without_metadata(content: bytes) -> bytes | None:
    """A copy of an image file without ICC profiles, comments, text and the like; None for other formats.

    Pillow parses metadata before pixels, so that a malformed tag can hide a sound image. EXIF data, which Pillow
    parses later, stays in PNG and WebP files; a JPEG's is left out (see :func:`jpeg_orientation`), and that of AVIF
    and HEIC files, whose orientation is a property of the image.
    """
    try:
        if content.startswith(b"\xff\xd8"):
            return _jpeg_pixels(content)
        if content.startswith(_PNG_SIGNATURE):
            return _png_pixels(content)
        if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            return _webp_pixels(content)
        if content.startswith((b"II*\0", b"MM\0*")):
            return _tiff_pixels(content)
        if content[4:8] == b"ftyp":
            return _HEIF_EXIF_ITEM.sub(rb"\1free", content)
    except (struct.error, IndexError):
        pass  # too short for its own structure
    return None


def _jpeg_segments(content: bytes) -> Iterator[_Segment]:
    """The marker segments before the first scan."""
    start = 2
    while start + 4 <= len(content) and content[start] == 0xFF:
        marker = content[start + 1]
        if marker == 0xFF:  # a fill byte
            start += 1
            continue
        if marker == _SCAN_MARKER[1]:
            return
        payload = start + 2
        end = payload if marker in _WITHOUT_LENGTH else payload + int.from_bytes(content[payload : payload + 2])
        yield _Segment(marker, start, min(payload + 2, end), end)
        start = end


def _jpeg_pixels(content: bytes) -> bytes:
    kept, end = [content[:2]], 2
    for segment in _jpeg_segments(content):
        # JFIF and Adobe segments say which colours the components are.
        if segment.marker in (_APP0, _APP14) or not (_APP0 <= segment.marker <= _APP15 or segment.marker == _COMMENT):
            kept.append(content[segment.start : segment.end])
        end = segment.end
    return b"".join([*kept, content[end:]])


def png_bit_depth(content: bytes) -> int:
    """Bits per sample of a PNG; 0 for other files."""
    return content[24] if content.startswith(_PNG_SIGNATURE) and len(content) > 24 else 0


def png_significant_bits(content: bytes) -> int:
    """Significant bits of a PNG's first channel, by its chunk sBIT; 0 where there is none."""
    header_end = content.find(b"IDAT")
    place = content.find(b"sBIT", 0, max(header_end, 0))
    return content[place + 4] if place > 0 and content[place + 4] <= 16 else 0


def _png_pixels(content: bytes) -> bytes:
    kept, start = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while start + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, start)
        name, chunk = content[start + 4 : start + 8], content[start : start + 12 + length]
        if name in _PNG_CHUNKS or (name == _PNG_EXIF and chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))):
            kept.append(chunk)
        start += 12 + length
    return b"".join(kept)


def _webp_pixels(content: bytes) -> bytes:
    kept, start = [b"WEBP"], 12
    while start + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, start)
        end = start + 8 + length + length % 2
        if name == b"VP8X" and length >= 1:
            flags = content[start + 8] & ~_WEBP_METADATA_FLAGS
            kept.append(content[start : start + 8] + bytes([flags]) + content[start + 9 : end])
        elif name not in _WEBP_METADATA_CHUNKS:
            kept.append(content[start:end])
        start = end
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff_pixels(content: bytes) -> bytes:
    order = "<" if content.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, directory)
    entries = [content[place : place + 12] for place in range(directory + 2, directory + 2 + 12 * count, 12)]
    kept = []
    for entry in entries:
        tag, kind, values, first = struct.unpack(order + "HHIH2x", entry)
        sound = tag != ORIENTATION_TAG or (kind == 3 and values == 1 and 1 <= first <= 8)
        if tag in _TIFF_PIXEL_TAGS and sound:
            kept.append(entry)
    # The directory shrinks in place: offsets of values elsewhere stay right. A second page is not needed.
    table = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:directory] + table + content[directory + len(table) :]
