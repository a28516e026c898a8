"""TFRecord files of tf.Example."""

from __future__ import annotations

import gzip
import io
import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from support import index_of, picture_files, read

from job.data.index.sources.tfrecord import _masked_crc, list_tfrecord
from job.errors import DataError

FILES = list(picture_files(["blue", "red"], 2).values())
Value = bytes | int | list[int] | list[bytes]


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def message(*fields: tuple[int, bytes]) -> bytes:
    return b"".join(varint(number << 3 | 2) + varint(len(content)) + content for number, content in fields)


def feature(value: Value, *, packed: bool = True) -> bytes:
    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], bytes):
        return message((1, message(*((1, each) for each in values if isinstance(each, bytes)))))
    numbers = [varint(each) for each in values if isinstance(each, int)]
    return message((3, message((1, b"".join(numbers))) if packed else b"".join(b"\x08" + each for each in numbers)))


def example(packed: bool = True, **features: Value) -> bytes:
    entries = [
        (1, message((1, name.replace("__", "/").encode()), (2, feature(value, packed=packed))))
        for name, value in features.items()
    ]
    return message((1, message(*entries)))


def framed(record: bytes) -> bytes:
    size = struct.pack("<Q", len(record))
    return size + struct.pack("<I", _masked_crc(size)) + record + struct.pack("<I", _masked_crc(record))


def labels(*records: bytes) -> list[tuple[bytes, str | tuple[str, ...] | None]]:
    content = b"".join(map(framed, records))
    return [
        (content[m.offset : m.offset + m.size], m.label if m.labels is None else m.labels)
        for m in list_tfrecord("a.tfrecord", io.BytesIO(content))
    ]


@pytest.mark.parametrize(
    "name", ["a.tfrecord", "a.tfrecords", "a.tfrec", "train.tfrecord-00000-of-00010", "a.tfrecord.gz"]
)
def test_records_are_read_like_members_of_a_tar(name: str, tmp_path: Path) -> None:
    records = [
        example(image__class__text=b"xy"[n % 2 : n % 2 + 1], image__encoded=content, image__class__label=n % 2)
        for n, content in enumerate(FILES)
    ]
    content = b"".join(map(framed, records))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    index = index_of(tmp_path / name)
    assert index.classes == ("x", "y")
    assert index.keys == [f"000000{n}.jpg" for n in range(4)]
    assert read(index, [3, 0], tmp_path / "cache") == [FILES[3], FILES[0]]


def test_labels_of_records() -> None:
    assert labels(
        example(image__encoded=b"a", image__class__label=7, image__class__text=b"cat"),
        example(image__encoded=b"b", image__class__label=7, image__class__text=b""),
        example(label=3, image=b"c"),
        example(False, label=300, image_raw=b"d"),
        example(label=-1, image=b"e"),
        example(label=[1, 2], image=b"f"),
        example(label=[b"cat", b"dog"], image=b"g", more=5),
        example(image=b"h"),
    ) == [
        (b"a", "cat"),
        (b"b", "7"),
        (b"c", "3"),
        (b"d", "300"),
        (b"e", "-1"),
        (b"f", ("1", "2")),
        (b"g", ("cat", "dog")),
        (b"h", None),
    ]


SOUND = framed(example(image=b"x" * 100, label=1))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"no record at all", "wrong checksum of its length"),
        (SOUND[:-5], "cut short"),
        (SOUND + SOUND[:7], r"record 1 .* cut short"),
        (SOUND[:50] + b"?" + SOUND[51:], "does not match its checksum"),
        (struct.pack("<QI", 1 << 40, _masked_crc(struct.pack("<Q", 1 << 40))), "more than"),
        (framed(b"\xff" * 30), "no tf.Example"),
        (framed(message((1, b"\x0a\x7f"))), "leads out of its message"),
        (framed(b"\x0b" * 10), "wire type 3"),
        (framed(example(label=1)), "no image: its features are label"),
        (framed(example(image=[b"1", b"2"])), "2 values of image"),
        (framed(example(image=b"x", label=b"y" * 2000)), "too long labels"),
        (framed(example(image=b"x", label=list(range(5000)))), "more than 4096 labels"),
        (framed(example(image=b"x", label=b"\xff")), "no tf.Example"),
        (framed(b"\x08\x01" * 1_000_000), "more than 1,024 fields"),
        (gzip.compress(SOUND * 10, mtime=0), "compressed by gzip"),
    ],
    ids=range(15),
)
def test_malformed_records_are_refused_within_bounds(content: bytes, text: str) -> None:
    began = time.process_time()
    tracemalloc.start()
    with pytest.raises(DataError, match=text):
        list(list_tfrecord("a.tfrecord", io.BytesIO(content)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert time.process_time() - began < 5


def test_damaged_examples_end_in_a_message() -> None:
    """Records with valid checksums and invalid content."""
    rng = random.Random(0)
    intact = example(image=b"x" * 40, label=[1, 2], image__class__text=b"cat")
    for _ in range(2000):
        content = bytearray(intact)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.choice([0, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        try:
            for member in list_tfrecord("a.tfrecord", io.BytesIO(framed(bytes(content)))):
                assert 0 <= member.offset <= member.offset + member.size <= len(content) + 12
        except DataError:
            pass
