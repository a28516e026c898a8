from __future__ import annotations

import os
from pathlib import Path

import pytest

from job import storage
from job.errors import StorageError, StorageOutage


@pytest.fixture(params=["memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}" if request.param == "memory" else str(tmp_path)


def test_written_objects_are_read_and_listed(folder: str) -> None:
    storage.write_bytes(f"{folder}/a/one", b"1")
    storage.write_many(folder, {"a/two": b"22", "three": b"333"})
    reader = storage.Reader(folder)
    assert [reader.read("three"), reader.read("a/two"), reader.read("three", 1, 2)] == [b"333", b"22", b"33"]
    files = [e for e in storage.list_files(folder) if not e.is_dir]
    assert [(e.key, e.size) for e in files] == [("a/one", 1), ("a/two", 2), ("three", 3)]
    storage.remove(f"{folder}/three")
    storage.remove(f"{folder}/three")
    assert not storage.exists(f"{folder}/three")


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes(str(tmp_path / "x"), b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_errors_name_the_uri_and_the_remedy(folder: str) -> None:
    with pytest.raises(StorageError, match=rf"{folder}/nothing: no such bucket, object or folder"):
        storage.read_bytes(f"{folder}/nothing")
    with pytest.raises(StorageError, match="nosuch"):
        storage.read_bytes("nosuch://x/y")


def test_an_unreachable_server_is_an_outage() -> None:
    with pytest.raises(StorageOutage, match=r"http://127\.0\.0\.1:9/a\.zip"):
        storage.read_bytes("http://127.0.0.1:9/a.zip")


def test_only_transient_errors_are_retried() -> None:
    calls = []

    def fails(error: Exception, times: int) -> None:
        calls.append(error)
        if len(calls) <= times:
            raise error

    storage.retry(lambda: fails(StorageOutage("busy"), 2), seconds=300, waiting="x waits")
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(StorageError, match="denied"):
        storage.retry(lambda: fails(StorageError("denied"), 2), seconds=20, waiting="x waits")
    assert len(calls) == 1
    with pytest.raises(StorageOutage):
        storage.retry(lambda: fails(StorageOutage("busy"), 99), seconds=1, waiting="x waits")


def test_an_upload_is_compared_with_the_stores_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    storage.require_same("gs://b/x", {"size": 3, "md5Hash": "kAFQmDzST7DWlj99KOF/cg=="}, tmp_path / "x")
    with pytest.raises(StorageOutage, match="3 here"):
        storage.require_same("gs://b/x", {"size": 2}, tmp_path / "x")
    with pytest.raises(StorageOutage, match="MD5"):
        storage.require_same("gs://b/x", {"size": 3, "md5Hash": "AAAA"}, tmp_path / "x")


def test_join_and_basename() -> None:
    assert storage.join("gs://b/", "a/", "/c") == "gs://b/a/c"
    assert storage.join("/", "a") == "/a"
    assert storage.basename("https://host/a%20b.zip?alt=media") == "a%20b.zip"
    assert storage.basename("gs://b/dir/") == "dir"
