"""Untrusted archives: read in bounded memory, or refused with a message."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import index_of, picture, picture_files, read, tar_of, zip_of

from job.data import dataset
from job.data.dataset import ImageDataset, Preprocessing
from job.data.index import bounded
from job.data.index.bounded import unpack
from job.data.index.sources.tar_archive import list_tar
from job.data.index.sources.zip_archive import list_zip, zip_content
from job.data.sampler import ResumableBatchSampler
from job.errors import DataError, StorageError

FILES = picture_files(["blue", "red"], 2)
LABELLED = {
    "0.jpg": FILES["red/000.jpg"],
    "0.cls": b"red",
    "1.jpg": FILES["blue/000.jpg"],
    "1.json": b'{"label": "blue"}',
}


def members(content: bytes) -> list[str]:
    listed = list_zip if zipfile.is_zipfile(io.BytesIO(content)) else list_tar
    return [member.key for member in listed("gs://b/archive", io.BytesIO(content))]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def sparse_header(name: str, size: int) -> bytes:
    """An old GNU sparse member of ``size`` bytes, none of which is stored."""
    block = bytearray(header(name, 0, tarfile.GNUTYPE_SPARSE))
    block[386:398], block[398:410] = b"%011o\0" % size, b"%011o\0" % 0
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
IMAGE = header("0.jpg", 3) + b"abc".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IMAGE + sparse_header("0.cls", 2 << 30) + END, "0.cls is sparse or larger than 1,048,576 bytes"),
        (sparse_header("0.jpg", 2 << 30) + END, "0.jpg is a sparse file"),
        (header("long", 2 << 30, tarfile.GNUTYPE_LONGNAME) + END, "not a readable archive"),
        (header("pax", 2 << 30, tarfile.XHDTYPE) + END, "not a readable archive"),
        (tar_of({"0.jpg": b"", "0.json": b"[" * 100_000}), "0.json is no JSON"),
        (tar_of({"0.jpg": b"", "0.json": b'{"a":' * 100_000}), "0.json is no JSON"),
        (tar_of({"0.jpg": b"", "0.json": b'{"label": NaN}'}), "0.json is no JSON"),
        (tar_of({"0.jpg": b"", "0.cls": b"\xff\xfe"}), "0.cls is not UTF-8"),
        (tar_of({"0.jpg": b"", "0.cls": b"x" * 2000}), "0.cls names a class of 2,000 characters"),
        (tar_of({"0.jpg": b"", "0.cls": b"x" * 2_000_000}), "0.cls is sparse or larger than 1,048,576"),
        (tar_of({"0.jpg": b"a"})[:1024] + b"x" * 512 + tar_of({"1.jpg": b"b"}), "bytes that are no header follow"),
        (tar_of({"0.jpg": b"a"})[:2048] + tar_of({"1.jpg": b"b"}), "bytes that are no header follow"),
        (tar_of({"0.jpg": b"a" * 600})[:1100], "not a readable archive"),
        (b"", "not a readable archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tar_with_false_sizes_is_refused_in_bounded_memory(content: bytes, message: str) -> None:
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        members(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_json_files_without_labels_are_ignored() -> None:
    """For example annotations of a whole data set, without an image of the same name."""
    files = {"annotations.json": b"[" + b"1," * 1_000_000 + b"1]", "notes.json": b"not JSON", **LABELLED}
    listed = {member.key: member.label for member in list_tar("x.tar", io.BytesIO(tar_of(files)))}
    assert listed == {"0.jpg": "red", "1.jpg": "blue"}


def test_names_that_are_not_utf8_are_kept_apart() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("caf\xe9.jpg", "caf\xe8.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    assert members(buffer.getvalue()) == ["caf%E9.jpg", "caf%E8.jpg"]


def test_zip_members_do_not_overlap() -> None:
    """Many entries that name one local header multiply its content."""
    content = zip_of({"a.jpg": b"1", "b.jpg": b"2"})
    entry = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
    lying = content[: entry + 42] + struct.pack("<L", 0) + content[entry + 46 :]
    with pytest.raises(DataError, match="overlaps another one"):
        members(lying)


def test_a_zip_directory_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.index.sources.zip_archive.LARGEST_DIRECTORY", 1 << 16)
    with pytest.raises(DataError, match="a header claims"):
        members(zip_of({f"{n:0200}.jpg": b"" for n in range(400)}))


def test_a_zip_member_does_not_expand_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.index.sources.zip_archive.LARGEST_MEMBER", 1 << 20)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(bytes(50 << 20)) + deflate.flush()
    tracemalloc.start()
    for size in (0, 100, 50 << 20):  # 0: it stands behind the content
        local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(packed), size, 0, 0)
        with pytest.raises(DataError, match="decompression bomb"):
            zip_content(local + packed, 0)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_gzip_is_unpacked_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, target = tmp_path / "a.tar.gz", tmp_path / "a.tar"
    packed.write_bytes(gzip.compress(bytes(20 << 20)))
    unpack("gs://b/a.tar.gz", packed, target)
    assert target.stat().st_size == 20 << 20
    monkeypatch.setattr(bounded, "SMALL_ARCHIVE", 1 << 20)
    with pytest.raises(DataError, match=r"gs://b/a.tar.gz is refused as a decompression bomb"):
        unpack("gs://b/a.tar.gz", packed, target)
    assert target.stat().st_size < 8 << 20
    monkeypatch.setattr(bounded, "FREE_DISK", 1 << 60)
    packed.write_bytes(gzip.compress(random.randbytes(1 << 20)))
    with pytest.raises(OSError, match="would be left on the disk"):
        unpack("gs://b/a.tar.gz", packed, target)
    content = bytearray(packed.read_bytes())
    content[20:30] = b"\xff" * 10
    packed.write_bytes(content)
    monkeypatch.setattr(bounded, "FREE_DISK", 0)
    with pytest.raises(DataError, match="not a readable archive"):
        unpack("gs://b/a.tar.gz", packed, target)


@pytest.mark.parametrize("suffix", ["tar", "zip", "tar.gz"])
def test_a_damaged_archive_raises_only_job_errors(suffix: str, tmp_path: Path) -> None:
    """Indexing and reading raise DataError and StorageError only."""
    rng = random.Random(suffix)
    intact = zip_of(FILES) if suffix == "zip" else tar_of({**FILES, **LABELLED})
    intact = gzip.compress(intact) if suffix == "tar.gz" else intact
    path = tmp_path / f"archive.{suffix}"
    refused = 0
    for _ in range(60):
        content = bytearray(intact)
        for _ in range(rng.randint(1, 4)):
            # A zip's directory stands at its end, tar's headers everywhere.
            first = max(len(content) - 300, 0) if suffix == "zip" and rng.random() < 0.7 else 0
            position = rng.randrange(first, len(content))
            if suffix == "tar":
                position = position // 512 * 512 + rng.choice([0, 124, 130, 156, 257, 345])
            content[position : position + 4] = rng.choice([rng.randbytes(4), b"\xff" * 4, b"\x80\0\0\0"])
        path.write_bytes(content)
        try:
            index = index_of(path, layout="images")
            read(index, list(range(len(index))), tmp_path)
        except (DataError, StorageError):
            refused += 1
    assert refused > 10


def test_a_file_too_large_for_an_image_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.fetch.LARGEST_MEMBER", 5000)
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "a.jpg").write_bytes(FILES["red/000.jpg"])
    (tmp_path / "red" / "b.jpg").write_bytes(bytes(5001))
    (tmp_path / "list.csv").write_text("uri,label\nred/a.jpg,red\nred/b.jpg,red\n")
    for uri in (tmp_path / "red", tmp_path / "list.csv"):
        samples = read(index_of(uri, layout="images"), [0, 1])
        assert samples[0] == FILES["red/000.jpg"]
        assert "larger than 5,000 bytes" in str(samples[1])


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri,label\npipe.jpg,red\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    (sample,) = read(index_of(tmp_path / "list.csv", layout="images"), [0])
    assert isinstance(sample, DataError)
    assert str(sample).startswith("cannot be read: it is no regular file")


@pytest.mark.parametrize("kind", ["folder", "zip", "manifest"])
def test_read_ahead_is_bounded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For highly compressed images, and for images of unknown size."""
    blank = picture((0, 0, 0), 0, file_format="BMP")
    large = blank + bytes(200_000)  # what lies behind a bitmap does not matter
    files = {f"red/{n:03}.bmp": large for n in range(64)}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    (tmp_path / "all.zip").write_bytes(buffer.getvalue())
    (tmp_path / "all.csv").write_text("uri,label\n" + "".join(f"{name},red\n" for name in files))
    uri = {"folder": tmp_path / "red", "zip": tmp_path / "all.zip", "manifest": tmp_path / "all.csv"}[kind]
    monkeypatch.setattr(dataset, "BYTES_AHEAD", 1 << 20)
    monkeypatch.setattr(dataset, "BYTES_AT_ONCE", 500_000)
    index = index_of(uri, layout="images")
    sampler = ResumableBatchSampler(len(index), 8, rank=0, world_size=1, seed=0, shuffle=True)
    images = ImageDataset(index, sampler, Preprocessing(32))
    for number in range(len(sampler)):
        batch = images[sampler.batch(0, number)]
        assert batch["mask"].all()
        ahead = list(images._ahead.values())
        assert sum(each.size() for each in ahead) <= (1 << 20) + 500_000
        assert all(each.size < 300_000 for entry in ahead for each in entry.future.result())
        if kind == "zip":
            assert all(each.size < 10_000 for entry in ahead for each in entry.future.result())


def test_a_narrow_image_is_cropped_before_it_is_resized() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((1, 60_000), np.uint8)).save(buffer, "PNG")
    assert Preprocessing(224).decoded(buffer.getvalue()).shape == (3, 224, 224)
    assert Preprocessing(224, "crop").decoded(buffer.getvalue()).shape == (3, 224, 224)
