"""Locks, permissions and folders of other users: problems disable the cache, not the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import picture_files, read, tar_of, write_files

from job.data.cache import SampleCache
from job.data.datamodule import ImageDataModule
from job.storage import local_cache
from job.storage.local_cache import cache_problem, locked, private_folder, usable_cache_dir

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to another user")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the folders of earlier tests, and use a new folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    cache_problem.cache_clear()
    usable_cache_dir.cache_clear()
    yield
    cache_problem.cache_clear()
    usable_cache_dir.cache_clear()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_follows_no_links(kind: str, tmp_path: Path) -> None:
    lock, target = tmp_path / "a.lock", tmp_path / "precious"
    if kind == "link":
        target.write_text("precious")
    if kind in ("link", "dangling link"):
        lock.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(OSError), locked(tmp_path / "a"):
        pass
    assert target.exists() == (kind == "link")
    assert kind != "link" or target.read_text() == "precious"


def test_a_lock_is_private_and_keeps_its_content(tmp_path: Path) -> None:
    with locked(tmp_path / "a"):
        assert mode(tmp_path / "a.lock") == 0o600


def test_private_folders(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    assert mode(private_folder(tmp_path / "open")) == 0o700
    assert mode(private_folder(tmp_path / "new")) == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(NotADirectoryError):
        private_folder(tmp_path / "link")
    if os.geteuid() == 0:
        os.chown(tmp_path / "new", 12345, 12345)
        with pytest.raises(PermissionError, match="belongs to user 12345"):
            private_folder(tmp_path / "new")


def test_a_table_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path / "samples", 10**9)
    cache.recount()
    (tmp_path / "samples" / "table").rename(tmp_path / "precious")
    before = (tmp_path / "precious").read_bytes()
    (tmp_path / "samples" / "table").symlink_to(tmp_path / "precious")
    cache.put("a", b"content")
    cache.flush()
    assert cache.get("a") == b"content"
    assert (tmp_path / "precious").read_bytes() == before
    assert not (tmp_path / "samples" / "table").is_symlink()


def test_samples_are_private(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path / "samples", 10**9)
    cache.recount()
    cache.put("a", b"content")
    cache.flush()
    assert mode(tmp_path / "samples") == 0o700
    assert len(list((tmp_path / "samples").iterdir())) == 3
    for path in (tmp_path / "samples").iterdir():
        assert mode(path) == 0o600, path


def unusable(kind: str, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    if kind == "unwritable":
        return Path("/proc/job-cache")
    if kind == "file":
        folder.write_text("x")
    elif kind == "linked part":
        folder.mkdir()
        (folder / "samples").symlink_to(tmp_path)
    else:
        folder.mkdir()
        os.chown(folder if kind == "another user" else private_folder(folder / "index"), 12345, 12345)
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        "unwritable",
        "file",
        "linked part",
        pytest.param("another user", marks=needs_root),
        pytest.param("part of another user", marks=needs_root),
    ],
)
def test_an_unusable_cache_folder_disables_only_the_cache(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = picture_files(["blue", "red"], 6)
    (tmp_path / "data.tar.gz").write_bytes(tar_of(files, "w:gz"))
    monkeypatch.setattr(ImageDataModule, "_run_dir", lambda self: f"memory://unusable/{kind.replace(' ', '-')}")
    folder = unusable(kind, tmp_path)
    for _ in range(2):
        data = ImageDataModule(root=str(tmp_path / "data.tar.gz"), cache_dir=str(folder))
        data.setup("fit")
        assert read(data.parts["train"], [0], data.cache_dir) == [files["blue/000.jpg"]]
        assert not data.is_cache_usable
        assert data.cache is None
    assert caplog.text.count("cannot be the cache") == 1
    assert "--data.cache_dir" in caplog.text
    temporary = tmp_path / "tmp" / f"job-cache-{os.geteuid()}"
    assert str(temporary) in caplog.text
    assert mode(temporary) == 0o700
    assert not list(tmp_path.glob("cache/archives/*.tar*"))


def test_another_users_temporary_cache_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "tmp" / f"job-cache-{os.geteuid()}").symlink_to(write_files(tmp_path / "elsewhere", {"a": b""}))
    usable = usable_cache_dir(Path("/proc/job-cache"))
    assert usable.parent == tmp_path / "tmp"
    assert not usable.is_symlink()
    shutil.rmtree(usable)


def test_an_existing_folder_keeps_its_permissions(tmp_path: Path) -> None:
    """Folders created in it are private."""
    (tmp_path / "cache").mkdir(mode=0o755)
    assert usable_cache_dir(tmp_path / "cache") == tmp_path / "cache"
    assert mode(tmp_path / "cache") == 0o755
    assert {mode(path) for path in (tmp_path / "cache").iterdir()} == {0o700}
    assert local_cache.cache_problem(tmp_path / "new") is None
    assert mode(tmp_path / "new") == 0o700
