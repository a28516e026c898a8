"""Labels in tar shards, by the WebDataset convention."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from support import index_of, index_parts, picture_files, read, tar_of

from job.data.index import bounded
from job.data.index.bounded import unpack
from job.data.index.left_out import LeftOut
from job.data.index.sources.tar_archive import list_tar
from job.errors import DataError

Labels = dict[str, str | tuple[str, ...] | None]


def labels_of(files: dict[str, bytes]) -> tuple[Labels, list[str]]:
    """Return the labels of the images by name, and the counts of skipped files."""
    left_out = LeftOut()
    members = list(list_tar("s.tar", io.BytesIO(tar_of(files)), left_out))
    labels: Labels = {
        m.key: m.label if m.labels is None else m.labels for m in members if m.key.endswith((".jpg", ".png"))
    }
    return labels, [f"{kind.count} {kind.kind}" for kind in left_out.kinds()]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.0.jpg": b"", "a.0.cls": b"0", "a.1.jpg": b"", "a.1.cls": b"1"}, {"a.0.jpg": "0", "a.1.jpg": "1"}),
        ({"a.0.cls": b"0", "a.1.cls": b"1", "a.0.jpg": b"", "a.1.jpg": b""}, {"a.0.jpg": "0", "a.1.jpg": "1"}),
        ({"v1.5/a.jpg": b"", "v1.5/a.cls": b"0", "v1.5/b.jpg": b""}, {"v1.5/a.jpg": "0", "v1.5/b.jpg": None}),
        ({"x/a.jpg": b"", "x/a.cls": b"0", "y/a.jpg": b"", "y/a.cls": b"1"}, {"x/a.jpg": "0", "y/a.jpg": "1"}),
        ({"a.jpg": b"", "a.label.json": b'{"label": "x"}'}, {"a.jpg": "x"}),
        ({"a.rgb.png": b"", "a.cls": b"7"}, {"a.rgb.png": "7"}),
        ({"a.jpg": b"", "a.cls": b"3", "a.cls2": b"9", "a.txt": b"8", "a.json": b'{"caption": "c"}'}, {"a.jpg": "3"}),
        ({"a.json": b'{"label": 1}', "a.jpg": b"", "a.cls": b"3"}, {"a.jpg": "3"}),
        ({"a.json": b'{"label": 1}', "a.jpg": b"", "a.cls": b" "}, {"a.jpg": "1"}),
        ({"a.json": b"{", "a.jpg": b"", "a.cls": b"3"}, {"a.jpg": "3"}),
        ({"a.jpg": b"", "a.CLS": b"3"}, {"a.jpg": "3"}),
        ({"a.jpg": b"", "a.json": b'{"label": ["x", 2, true]}'}, {"a.jpg": ("x", "2", "true")}),
        ({"a.jpg": b"", "a.json": b'{"labels": []}'}, {"a.jpg": ()}),
        ({"a.jpg": b"", "._a.jpg": b"", "a.cls": b"1", "._a.cls": b"\0\5"}, {"a.jpg": "1", "._a.jpg": None}),
    ],
)  # fmt: skip
def test_an_image_has_the_label_of_its_own_name(files: dict[str, bytes], expected: Labels) -> None:
    assert labels_of(files) == (expected, [])


def test_further_images_of_a_sample_are_skipped() -> None:
    files = {"a.jpg": b"", "a.seg.png": b"", "a.depth.png": b"", "a.cls": b"0"}
    assert labels_of(files) == ({"a.jpg": "0"}, ["2 other images of WebDataset samples"])
    masks = {"a.01.jpg": b"", "a.01.mask.png": b"", "a.01.cls": b"0", "a.02.jpg": b"", "a.02.cls": b"1"}
    assert labels_of(masks) == ({"a.01.jpg": "0", "a.02.jpg": "1"}, ["1 other images of WebDataset samples"])
    assert labels_of({"cats/a.jpg": b"", "cats/a.seg.png": b""})[1] == []


def test_labels_without_an_image_are_counted() -> None:
    files = {"a.jpg": b"", "b.jpg": b"", "a.cls": b"0", "b.cls": b"1", "notes.json": b'{"version": 1}'}
    assert labels_of(files) == (
        {"a.jpg": None, "b.jpg": None},
        ["2 labels with no image of their name beside them"],
    )


@pytest.mark.parametrize(
    "files",
    [
        {"scan.left.jpg": b"", "scan.right.jpg": b"", "scan.cls": b"0"},
        {"scan.jpg": b"", "scan.a.cls": b"0", "scan.b.cls": b"1"},
        {"scan.1.jpg": b"", "scan.1.cls": b"0", "scan.2.jpg": b"", "scan.two.cls": b"1"},
    ],
)
def test_labels_that_may_be_meant_for_several_images_are_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match=r"s\.tar: .*scan\..*Which label is meant"):
        labels_of(files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"label": [' + b'"x",' * 5000 + b'"x"]}', "5,001 labels"),
        (b'{"label": ["' + b"x" * 2000 + b'"]}', "2,000 characters"),
        (b'{"label": ["x", null]}', "an empty label"),
        (b'{"label": "\\ud800"}', "no JSON|not UTF-8"),
    ],
)
def test_malformed_labels_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        labels_of({"a.jpg": b"", "a.json": content})


FILES = picture_files(["blue", "red"], 2)
PACKED = {
    "tar.bz2": bz2.compress,
    "tbz2": bz2.compress,
    "tar.xz": lzma.compress,
    "txz": lambda content: lzma.compress(content[:3000]) + bytes(8) + lzma.compress(content[3000:]),
    "tar.zst": lambda content: pa.compress(content, "zstd", asbytes=True),
    "tzst": lambda c: pa.compress(c[:3000], "zstd", asbytes=True) + pa.compress(c[3000:], "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_tars(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(PACKED[suffix](tar_of(FILES)))
    index = index_parts(path)["train"]
    assert read(index, [0, 3], tmp_path) == [FILES["blue/000.jpg"], FILES["red/001.jpg"]]
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match="not a readable archive"):
        index_parts(path)
    path.write_bytes(b"no such stream" * 100)
    with pytest.raises(DataError, match="not a readable archive"):
        index_parts(path)
    path.write_bytes(PACKED[suffix](bytes(20 << 20)))
    monkeypatch.setattr(bounded, "SMALL_ARCHIVE", 1 << 20)
    with pytest.raises(DataError, match="decompression bomb"):
        unpack(str(path), path, tmp_path / "target")
    assert (tmp_path / "target").stat().st_size < 8 << 20


def test_xz_does_not_take_the_memory_that_a_header_claims(tmp_path: Path) -> None:
    header = bytearray(lzma.compress(b"x" * 100, preset=0))
    header[12 + 4] = 36  # the dictionary of the block: 1 GiB
    header[12 + 8 : 12 + 12] = zlib.crc32(header[12 : 12 + 8]).to_bytes(4, "little")
    (tmp_path / "a.tar.xz").write_bytes(header)
    with pytest.raises(DataError, match=r"[Mm]emory"):
        unpack("a.tar.xz", tmp_path / "a.tar.xz", tmp_path / "target")


def test_an_index_of_shards_with_dots_in_names(tmp_path: Path) -> None:
    images = list(FILES.values())
    files = {}
    for n in range(4):
        files |= {f"scan.{n:03}.jpg": images[n], f"scan.{n:03}.cls": b"%d" % (n % 2)}
    (tmp_path / "s.tar").write_bytes(tar_of(files))
    index = index_of(tmp_path / "s.tar")
    assert index.labels.tolist() == [0, 1, 0, 1]
    assert read(index, [2]) == [images[2]]
