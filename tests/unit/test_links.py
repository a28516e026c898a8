"""Links and special members of archives."""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import pytest
from support import tar_of

from job.data.index.left_out import LeftOut
from job.data.index.sources import tar_archive
from job.data.index.sources.tar_archive import list_tar
from job.data.index.sources.zip_archive import list_zip, zip_content
from job.errors import DataError

SYMLINK, HARD_LINK = tarfile.SYMTYPE, tarfile.LNKTYPE


def tar_with(*members: tuple[str, bytes | tuple[bytes, str]]) -> bytes:
    """A tar of files (name, content) and links (name, (type, target))."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            item = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                item.type, item.linkname = content
                archive.addfile(item)
            else:
                item.size = len(content)
                archive.addfile(item, io.BytesIO(content))
    return buffer.getvalue()


def listed(content: bytes) -> tuple[dict[str, tuple[bytes, str | None]], dict[str, int]]:
    """Return (content, label) of the members by name, and the counts of skipped files."""
    left_out = LeftOut()
    samples = {
        member.key: (content[member.offset : member.offset + member.size], member.label)
        for member in list_tar("a.tar", io.BytesIO(content), left_out)
    }
    return samples, {kind.kind: kind.count for kind in left_out.kinds()}


def zip_with(*members: tuple[str, bytes, int]) -> bytes:
    """A zip of (name, content, mode)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, mode in members:
            item = zipfile.ZipInfo(name)
            item.create_system, item.external_attr = 3, mode << 16
            archive.writestr(item, content)
    return buffer.getvalue()


def zip_listed(content: bytes) -> tuple[dict[str, bytes], dict[str, int]]:
    left_out = LeftOut()
    samples = {
        member.key: zip_content(content[member.offset : member.offset + member.size], member.version)
        for member in list_zip("a.zip", io.BytesIO(content), left_out)
    }
    return samples, {kind.kind: kind.count for kind in left_out.kinds()}


def test_links_in_a_tar_are_the_files_that_they_name() -> None:
    content = tar_with(
        ("./red/later.jpg", (SYMLINK, "../blue/1.jpg")),
        ("./red/1.jpg", b"red"),
        ("./red/2.jpg", (HARD_LINK, "./red/1.jpg")),
        ("./red/3.jpg", (HARD_LINK, "red/2.jpg")),
        ("./blue/1.jpg", b"blue"),
        ("./blue/same.jpg", (SYMLINK, "1.jpg")),
        ("./blue/chain.jpg", (SYMLINK, "./../red/later.jpg")),
    )
    files, left_out = listed(content)
    assert {name: content for name, (content, _) in files.items()} == {
        "./red/1.jpg": b"red",
        "./red/2.jpg": b"red",
        "./red/3.jpg": b"red",
        "./red/later.jpg": b"blue",
        "./blue/1.jpg": b"blue",
        "./blue/same.jpg": b"blue",
        "./blue/chain.jpg": b"blue",
    }
    assert not left_out


def test_a_link_means_the_last_file_of_that_name() -> None:
    content = tar_with(("a.jpg", b"old"), ("b.jpg", (SYMLINK, "a.jpg")), ("a.jpg", b"new"))
    assert listed(content)[0]["b.jpg"] == (b"new", None)


def test_broken_links_are_counted() -> None:
    content = tar_with(
        ("1.jpg", b"x"),
        ("absolute.jpg", (SYMLINK, "/etc/passwd")),
        ("outside.jpg", (SYMLINK, "../1.jpg")),
        ("missing.jpg", (HARD_LINK, "2.jpg")),
        ("itself.jpg", (SYMLINK, "itself.jpg")),
        ("round.jpg", (SYMLINK, "about.jpg")),
        ("about.jpg", (SYMLINK, "round.jpg")),
        ("pipe.jpg", (tarfile.FIFOTYPE, "")),
        ("device", (tarfile.BLKTYPE, "")),
        ("folder", (tarfile.DIRTYPE, "")),
        ("of_a_vendor.jpg", (b"Z", "")),
    )
    files, left_out = listed(content)
    assert files.keys() == {"1.jpg", "of_a_vendor.jpg"}
    assert left_out == {"links to no file of the archive": 6, "devices and pipes": 2}


def test_links_have_labels_and_are_labels() -> None:
    """Deduplicated shards: equal .cls files are hard links to the first."""
    content = tar_with(
        ("0.cls", b"dog"),
        ("0.jpg", b"0"),
        ("1.cls", (HARD_LINK, "0.cls")),
        ("1.jpg", b"1"),
        ("2.jpg", (HARD_LINK, "0.jpg")),
        ("2.cls", b"cat"),
    )
    files, _ = listed(content)
    assert files == {"0.jpg": (b"0", "dog"), "1.jpg": (b"1", "dog"), "2.jpg": (b"0", "cat")}


def test_many_links_take_bounded_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_archive, "MOST_WAITING", 200)
    chain = [(f"{n:05}.jpg", (SYMLINK, f"{n + 1:05}.jpg")) for n in range(3000)]
    links = [(f"{n}.jpg", (HARD_LINK, "a.jpg")) for n in range(3000)]
    began = time.thread_time()
    with pytest.raises(DataError, match="more than 100 links whose targets"):
        listed(tar_with(*chain))
    assert len(listed(tar_with(("a.jpg", b"x"), *links))[0]) == 3001
    monkeypatch.setattr(tar_archive, "MOST_WAITING", 1 << 17)
    files, left_out = listed(tar_with(*chain, ("03000.jpg", b"x")))
    assert len(files) == 1 + tar_archive.LONGEST_CHAIN + 1
    assert left_out == {"links to no file of the archive": 3000 - tar_archive.LONGEST_CHAIN - 1}
    assert time.thread_time() - began < 20


def test_symbolic_links_in_a_zip_are_the_files_that_they_name() -> None:
    link, file = stat.S_IFLNK | 0o777, stat.S_IFREG | 0o644
    content = zip_with(
        ("red/link.jpg", b"../blue/1.jpg", link),
        ("red/chain.jpg", b"link.jpg", link),
        ("blue/1.jpg", b"blue", file),
        ("outside.jpg", b"../../etc/passwd", link),
        ("absolute.jpg", b"/etc/passwd", link),
        ("itself.jpg", b"itself.jpg", link),
        ("not_utf8.jpg", b"\xff", link),
        ("long.jpg", b"x" * 100_000, link),
    )
    files, left_out = zip_listed(content)
    assert files == dict.fromkeys(("red/link.jpg", "red/chain.jpg", "blue/1.jpg"), b"blue")
    assert left_out == {"links to no file of the archive": 5}


def test_a_zip_behind_other_bytes_and_with_replaced_members() -> None:
    """A self-extracting archive, two archives in one file, and members that were replaced by ``zip -u``."""
    buffer = io.BytesIO(b"#!/bin/sh\n" * 100 + zip_with(("old.jpg", b"old", 0)))
    buffer.seek(0, io.SEEK_END)
    second = zip_with(("new.jpg", b"new", 0))
    buffer.write(second)
    assert zip_listed(buffer.getvalue())[0] == {"new.jpg": b"new"}
    # A stored member whose size follows it, and dead bytes in turn.
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 8, 0, 0, 0, 0, 0, 0, 5, 0) + b"a.jpg" + b"content"
    for signature in (b"PK\7\x08", b""):
        descriptor = signature + struct.pack("<3L", zlib.crc32(b"content"), 7, 7)
        assert zip_content(local + descriptor + b"dead" * 100, zlib.crc32(b"content")) == b"content"


def test_names_in_utf8_without_the_flag_for_it() -> None:
    """As written by macOS."""
    content = zip_with(("caf\xe9/1.jpg", b"x", 0))
    flags = content.index(b"PK\1\2") + 8
    unflagged = content[:flags] + b"\0\0" + content[flags + 2 :]
    unflagged = unflagged[:6] + b"\0\0" + unflagged[8:]
    assert zip_listed(unflagged)[0] == {"caf\xe9/1.jpg": b"x"}


def test_only_images_must_be_readable_in_a_zip() -> None:
    def encrypted(name: str) -> bytes:
        content = bytearray(zip_with(("0.jpg", b"x", 0), (name, b"y", 0)))
        content[content.rindex(b"PK\1\2") + 8] |= 1
        return bytes(content)

    assert zip_listed(encrypted("notes.txt")) == ({"0.jpg": b"x"}, {"encrypted files and rare compressions": 1})
    with pytest.raises(DataError, match=r"1\.jpg is encrypted"):
        zip_listed(encrypted("1.jpg"))


def test_a_listing_of_a_tar_holds_few_bytes_per_member() -> None:
    content = tar_of({f"{n:06}.jpg": b"" for n in range(5_000)})
    tracemalloc.start()
    count = sum(1 for _ in list_tar("a.tar", io.BytesIO(content)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5_000
    assert peak < 2 << 20


def test_the_example_of_a_kind_does_not_depend_on_the_order() -> None:
    """Archives are listed by several threads."""
    for names in (["b", "a", "c"], ["c", "b", "a"]):
        left_out = LeftOut()
        for name in names:
            left_out.add("kind", name)
        assert [(kind.count, kind.example) for kind in left_out.kinds()] == [(3, "a")]
