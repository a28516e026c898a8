from __future__ import annotations

import io
import os
import tarfile
import threading
from pathlib import Path

import pytest
from support import picture_files, zip_of

from job import storage
from job.data.index import find_parts
from job.data.source import materialise
from job.errors import DataError, StorageError

FILES = {f"photos/{part}/{key}": c for part in ("train", "val") for key, c in picture_files(["blue", "red"], 2).items()}


def tar_of(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for key, content in files.items():
            member = tarfile.TarInfo(key)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.zip", zip_of(FILES)), ("a.tar", tar_of(FILES, "w")), ("a.tar.gz", tar_of(FILES, "w:gz"))],
)
def test_archives_in_a_bucket_read_like_folders(name: str, content: bytes, tmp_path: Path) -> None:
    storage.write_bytes(f"memory://archives/{name}", content)
    parts = find_parts(materialise(f"memory://archives/{name}", str(tmp_path)))
    assert {part: len(index) for part, index in parts.items()} == {"train": 4, "val": 4}
    assert storage.read_bytes(parts["train"].uri(3)) == FILES["photos/train/red/001.jpg"]


def test_an_archive_is_fetched_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, cache = tmp_path / "a.zip", tmp_path / "cache"
    archive.write_bytes(zip_of(FILES))
    fetched = []
    download = storage.download

    def counted(uri: str, target: Path) -> None:
        fetched.append(uri)
        download(uri, target)

    monkeypatch.setattr(storage, "download", counted)
    threads = [threading.Thread(target=materialise, args=(str(archive), str(cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    archive.write_bytes(zip_of({**FILES, "photos/train/red/9.jpg": b"x"}))
    assert len(find_parts(materialise(str(archive), str(cache)))["train"]) == 5
    assert len(fetched) == 2


@pytest.mark.parametrize("name", ["../../evil.jpg", "/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_outside_the_target_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    content = zip_of({name: b"x"}) if kind == "zip" else tar_of({name: b"x"}, "w")
    (tmp_path / f"evil.{kind}").write_bytes(content)
    with pytest.raises(DataError, match="outside the target folder"):
        materialise(str(tmp_path / f"evil.{kind}"), str(tmp_path / "deep" / "cache"))
    assert not list(tmp_path.rglob("evil.jpg"))


def test_links_and_other_files_are_not_unpacked(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("a/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        script = tarfile.TarInfo("a/run.sh")
        archive.addfile(script, io.BytesIO())
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    unpacked = Path(materialise(str(tmp_path / "a.tar"), str(tmp_path / "cache")))
    assert [p for p in unpacked.rglob("*") if not p.is_dir()] == []


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_damaged_archive_is_named_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    whole = zip_of(FILES) if name == "a.zip" else tar_of(FILES, "w:gz" if name.endswith("gz") else "w")
    (tmp_path / name).write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(DataError, match=name):
        materialise(str(tmp_path / name), str(tmp_path / "cache"))
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_a_wrong_checksum_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of(FILES))
    details = {**storage.info(str(tmp_path / "a.zip")), "md5Hash": "AAAA"}
    monkeypatch.setattr(storage, "info", lambda uri: details)
    with pytest.raises(StorageError, match="does not match its MD5"):
        materialise(str(tmp_path / "a.zip"), str(tmp_path / "cache"))


@pytest.mark.skipif(os.geteuid() != 0 and not os.access("/proc", os.W_OK), reason="needs an unwritable place")
def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of(FILES))
    with pytest.raises(StorageError, match=r"--data\.cache_dir"):
        materialise(str(tmp_path / "a.zip"), "/proc/job-cache")
