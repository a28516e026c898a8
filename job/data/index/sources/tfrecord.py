"""TFRecord files of tf.Example: each image is a range of its file, as in a tar."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO, NamedTuple

import google_crc32c

from job.data.index.bounded import LARGEST_MEMBER
from job.data.index.left_out import LeftOut
from job.data.index.magic import HEAD_BYTES, image_suffix
from job.data.index.sources.archive import Archive, Member
from job.data.index.sources.base import LONGEST_CLASS, MOST_LABELS
from job.errors import DataError

IMAGE_FEATURES = ("image/encoded", "image", "image_raw", "image/image_raw", "encoded", "jpeg", "image_bytes")
TEXT_FEATURES = ("image/class/text", "label/text", "class/text", "label_text", "class_name")
LABEL_FEATURES = ("image/class/label", "label", "class", "image/label", "target")
MOST_FIELDS = 1024
"""Features of a record, and values of a feature."""
_FRAME = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INT64_LIST, _BYTES_LIST = 3, 1  # fields of tf.train.Feature


class TFRecord(Archive):
    """A file of framed records, each a tf.Example with an encoded image; compressed by gzip it is copied."""

    name = "tfrecord"
    suffixes = (".tfrecord", ".tfrecords", ".tfrec", ".tfrecord.gz", ".tfrecords.gz", ".tfrec.gz")
    numbered = r"\.tf(record|records|rec)-\d+-of-\d+(\.gz)?$"
    is_shard = True

    def members(self, uri: str, file: IO[bytes], left_out: LeftOut) -> Iterator[Member]:
        """See :func:`list_tfrecord`."""
        return list_tfrecord(uri, file, left_out)


def list_tfrecord(uri: str, file: IO[bytes], left_out: LeftOut | None = None) -> Iterator[Member]:
    """The images of a TFRecord file in order, named by the numbers of their records.

    Labels are texts where the records have them, else numbers.

    Raises:
        DataError: it is no TFRecord file, cut short or damaged, or a record is no tf.Example with an image.
    """
    offset = number = 0
    while frame := _read(file, _FRAME.size):
        problem = f"{uri} is not a readable TFRecord file: record {number} (from 0)"
        if len(frame) < _FRAME.size:
            raise DataError(f"{problem} is cut short. Upload it again.")
        size, crc = _FRAME.unpack(frame)
        if frame.startswith(b"\x1f\x8b") and not number:
            raise DataError(f"{uri} is compressed by gzip, and its name does not say so. Append .gz to it.")
        if crc != _masked_crc(frame[:8]):
            raise DataError(f"{problem} has a wrong checksum of its length. Upload it again.")
        if size > LARGEST_MEMBER:
            raise DataError(f"{problem} has {size:,} bytes, more than {LARGEST_MEMBER:,}.")
        record = _read(file, size + _FOOTER.size)
        if len(record) < size + _FOOTER.size:
            raise DataError(f"{problem} is cut short. Upload it again.")
        if _FOOTER.unpack_from(record, size)[0] != _masked_crc(record[:size]):
            raise DataError(f"{problem} does not match its checksum. Upload it again.")
        try:
            member = _member(memoryview(record)[:size], offset + _FRAME.size, number)
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise DataError(f"{problem} is no tf.Example: {error}.") from error
        if isinstance(member, str):
            raise DataError(f"{problem} {member}")
        yield member
        offset += _FRAME.size + len(record)
        number += 1


class _Place(NamedTuple):
    start: int
    size: int


def _read(file: IO[bytes], size: int) -> bytes:
    """``size`` bytes, fewer at the end: one read of a bucket may return less."""
    chunks = []
    while size and (chunk := file.read(size)):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _member(record: memoryview, offset: int, number: int) -> Member | str:
    """The image of a record, or why it has none."""
    features = _features(record)
    image = next((name for name in IMAGE_FEATURES if name in features), None)
    if image is None:
        names = ", ".join(sorted(features))[:500]
        return f"has no image: its features are {names}; one of {', '.join(IMAGE_FEATURES)} is needed."
    places = _byte_values(record, features[image])
    if len(places) != 1:
        return f"has {len(places)} values of {image}, not one image."
    (place,) = places
    label = _label(record, features)
    head = record[place.start : place.start + min(place.size, HEAD_BYTES)].tobytes()
    key = f"{number:07d}.{image_suffix(head) or 'jpg'}"
    member = Member(key, offset + place.start, place.size, 0, None)
    return member._replace(labels=label) if isinstance(label, tuple) else member._replace(label=label)


def _label(record: memoryview, features: dict[str, _Place]) -> tuple[str, ...] | str | None:
    for name in (*TEXT_FEATURES, *LABEL_FEATURES):
        if name not in features:
            continue
        texts = [
            record[start : start + size].tobytes().decode() for start, size in _byte_values(record, features[name])
        ]
        labels = [text for text in texts or map(str, _int_values(record, features[name])) if text]
        if len(labels) > MOST_LABELS or any(len(label) > LONGEST_CLASS for label in labels):
            raise ValueError(f"{name} has too many or too long labels")
        if labels:
            return labels[0] if len(labels) == 1 else tuple(labels)
    return None


def _features(record: memoryview) -> dict[str, _Place]:
    """Places of the features of a tf.Example by name: Example.features.feature, a map."""
    places: dict[str, _Place] = {}
    for features in _fields(record, _Place(0, len(record)), 1)[-1:]:
        for entry in _fields(record, features, 1):
            keys, values = _fields(record, entry, 1), _fields(record, entry, 2)
            if keys and values:
                start, size = keys[-1]
                places[record[start : start + min(size, 1024)].tobytes().decode()] = values[-1]
    return places


def _byte_values(record: memoryview, feature: _Place) -> list[_Place]:
    return [value for values in _fields(record, feature, _BYTES_LIST) for value in _fields(record, values, 1)]


def _int_values(record: memoryview, feature: _Place) -> list[int]:
    numbers: list[int] = []
    for values in _fields(record, feature, _INT64_LIST):
        position, end = values.start, values.start + values.size
        while position < end:
            tag, position = _varint(record, position, end)
            if tag >> 3 == 1 and tag & 7 == _VARINT:
                number, position = _varint(record, position, end)
                numbers.append(number)
            elif tag >> 3 == 1 and tag & 7 == _BYTES:  # packed
                size, position = _varint(record, position, end)
                stop = position + size
                if stop > end:
                    raise ValueError("a field leads out of its message")
                while position < stop:
                    number, position = _varint(record, position, stop)
                    numbers.append(number)
            else:
                position = _skip(record, position, end, tag)
            if len(numbers) > MOST_LABELS:
                raise ValueError(f"it has more than {MOST_LABELS} labels")
    return [number - (1 << 64) if number >> 63 else number for number in numbers]


def _fields(record: memoryview, message: _Place, number: int) -> list[_Place]:
    """Places of the values of one field of a message; only strings, bytes and messages are read."""
    position, end = message.start, message.start + message.size
    places, count = [], 0
    while position < end:
        count += 1
        if count > MOST_FIELDS:
            raise ValueError(f"a message has more than {MOST_FIELDS:,} fields")
        tag, position = _varint(record, position, end)
        after = _skip(record, position, end, tag)
        if tag >> 3 == number and tag & 7 == _BYTES:
            size, start = _varint(record, position, end)
            places.append(_Place(start, size))
        position = after
    return places


def _skip(record: memoryview, position: int, end: int, tag: int) -> int:
    """The position after the value of a field."""
    kind = tag & 7
    if kind == _VARINT:
        return _varint(record, position, end)[1]
    if kind == _BYTES:
        size, position = _varint(record, position, end)
        position += size
    elif kind in (_FIXED64, _FIXED32):
        position += 8 if kind == _FIXED64 else 4
    else:
        raise ValueError(f"wire type {kind}")
    if position > end:
        raise ValueError("a field leads out of its message")
    return position


def _varint(record: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 64:
        byte = record[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
        shift += 7
    raise ValueError("a number is cut short")


def _masked_crc(content: bytes) -> int:
    crc = int(google_crc32c.value(content))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
