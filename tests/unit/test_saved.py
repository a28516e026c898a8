from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from support import index_parts, picture, picture_files, read, tar_of, write_files

from job import storage
from job.cli.index import main
from job.data.datamodule import ImageDataModule
from job.data.index.sources import resolve
from job.errors import DataError, StorageError
from job.storage import filesystems

FILES = picture_files(["blue", "red"], 6)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs that were listed."""
    listed: list[str] = []
    list_pages = storage.list_pages
    monkeypatch.setattr(storage, "list_pages", lambda uri, *a, **k: (listed.append(uri), list_pages(uri, *a, **k))[1])
    return listed


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("gs://b/images", "gs://b/images/.index"),
        ("gs://b", "gs://b/.index"),
        ("gs://b/a.zip", "gs://b/a.zip.index"),
        ("gs://b/s-{000..146}.tar", "gs://b/s-_000..146_.tar.index"),
        ("gs://b/x/index.json", "gs://b/x"),
    ],
)
def test_where_an_index_is_kept(uri: str, expected: str) -> None:
    assert resolve(uri).index_uri == expected


def test_a_prebuilt_index_is_used(
    tmp_path: Path, listed: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = str(write_files(tmp_path / "data", FILES))
    main(root)
    assert "2 classes; images: train 12" in capsys.readouterr().out
    assert listed == [root]
    caplog.set_level(logging.INFO)
    index = index_parts(root)["train"]
    assert "using the index of" in caplog.text
    assert listed == [root, root]  # to see that nothing was added
    assert index.keys == sorted(FILES)
    assert read(index, [3]) == [FILES["blue/003.jpg"]]


def test_an_index_elsewhere_is_a_data_set(tmp_path: Path, listed: list[str]) -> None:
    """For read-only buckets."""
    (tmp_path / "data.tar").write_bytes(tar_of(FILES))
    write_files(tmp_path / "more", picture_files(["green"], 2) | picture_files(["red"], 1, seed=5))
    main(str(tmp_path / "data.tar"), output=str(tmp_path / "kept"))
    index = index_parts(tmp_path / "kept" / "index.json", tmp_path / "more")["train"]
    assert index.classes == ("blue", "green", "red")
    assert [source.uri for source in index.sources] == [f"{tmp_path}/data.tar", f"{tmp_path}/more"]
    assert read(index, [0, 12]) == [FILES["blue/000.jpg"], picture_files(["green"], 2)["green/000.jpg"]]
    with pytest.raises(StorageError, match="python -m job index"):
        index_parts(tmp_path / "nothing" / "index.json")


def test_a_stale_index_is_rebuilt(tmp_path: Path, listed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    root = str(write_files(tmp_path / "data", FILES))
    main(root)
    (tmp_path / "data/red/002.jpg").write_bytes(picture((1, 2, 3), 4))
    index = index_parts(root)["train"]
    assert listed == [root, root]
    assert "out of date" in caplog.text
    assert read(index, [8]) == [picture((1, 2, 3), 4)]
    with pytest.raises(DataError, match="out of date"):
        index_parts(tmp_path / "data" / ".index" / "index.json")


def add(root: str) -> None:
    storage.write_bytes(f"{root}/red/new.jpg", picture((1, 2, 3), 4))


def add_class(root: str) -> None:
    storage.write_bytes(f"{root}/green/deep/new.jpg", picture((1, 2, 3), 4))


def remove(root: str) -> None:
    storage.remove(f"{root}/red/004.jpg")


def rename(root: str) -> None:
    storage.write_bytes(f"{root}/red/014.jpg", FILES["red/004.jpg"])
    remove(root)


@pytest.mark.parametrize("most_listed", [100, 1])
@pytest.mark.parametrize("change", [add, add_class, remove, rename])
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_added_and_removed_files_make_an_index_stale(
    kind: str,
    change: Callable[[str], None],
    most_listed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("job.data.index.freshness.MOST_LISTED", most_listed)
    monkeypatch.setattr("job.data.index.store.SAMPLES_CHECKED", 1)
    root = f"memory://grown/{tmp_path.name}" if kind == "memory" else str(tmp_path / "data")
    for key, content in FILES.items():
        storage.write_bytes(f"{root}/{key}", content)
    main(root)
    caplog.clear()
    assert len(index_parts(root)["train"]) == 12
    assert ("images added to others since then are not noticed" in caplog.text) == (most_listed == 1)
    storage.write_bytes(f"{root}/red/notes.txt", b"no image")
    caplog.clear()
    index_parts(root)
    assert "out of date" not in caplog.text
    change(root)
    index = index_parts(root)["train"]
    assert "out of date" in caplog.text
    expected = {add: 13, add_class: 13, remove: 11, rename: 12}[change]
    assert len(index) == expected
    assert ("green" in index.classes) == (change is add_class)
    with pytest.raises(DataError, match="out of date"):
        index_parts(f"{root}/.index/index.json")


def test_changed_labels_make_an_index_stale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a table beside unchanged images."""
    root = write_files(tmp_path / "data", {f"{n}.jpg": picture((1, 2, 3), n) for n in range(4)})
    for labels in ("aabb", "abab", "abac"):
        rows = "".join(f"{n}.jpg,{label}\n" for n, label in enumerate(labels))
        (root / "metadata.csv").write_text(f"file_name,label\n{rows}")
        index = index_parts(root)["train"]
        assert "".join(index.classes[label] for label in index.labels) == labels
        main(str(root))
    assert caplog.text.count("out of date") == 2


@pytest.mark.parametrize("change", ["add", "remove"])
def test_an_added_shard_makes_an_index_stale(change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pattern = f"{tmp_path}/s-*.tar"
    for number in range(3):
        (tmp_path / f"s-{number}.tar").write_bytes(tar_of(picture_files(["blue", "red"], 2, seed=number)))
    main(pattern)
    caplog.set_level(logging.INFO)
    assert len(index_parts(pattern)["train"]) == 12
    assert "using the index of" in caplog.text
    if change == "add":
        (tmp_path / "s-3.tar").write_bytes(tar_of(picture_files(["blue", "red"], 2, seed=3)))
    else:
        (tmp_path / "s-2.tar").unlink()
    assert len(index_parts(pattern)["train"]) == {"add": 16, "remove": 8}[change]
    assert "out of date: 3 archives were there then" in caplog.text


@pytest.mark.parametrize("damage", ["{", '{"format": 0}', "{}"])
def test_a_file_that_is_not_an_index_is_reported(damage: str, tmp_path: Path) -> None:
    root = str(write_files(tmp_path / "data", FILES))
    main(root)
    (tmp_path / "data/.index/index.json").write_text(damage)
    with pytest.raises(DataError, match="job index"):
        index_parts(root)


def test_a_run_lists_its_data_once(
    tmp_path: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next attempt uses the same index, unless the data has changed."""
    root, run_dir = str(write_files(tmp_path / "data", FILES)), f"memory://runs/{tmp_path.name}"
    monkeypatch.setattr(ImageDataModule, "_run_dir", lambda self: run_dir)

    def start() -> ImageDataModule:
        data = ImageDataModule(root=root, cache_dir=str(tmp_path / "cache"))
        data.setup("fit")
        return data

    caplog.set_level(logging.INFO)
    first, second = start(), start()
    assert listed == [root]
    assert first.fingerprint() == second.fingerprint()
    assert len(first.parts["val"]) == 2
    for key in FILES:
        write_files(tmp_path / "data", {key: picture((9, 9, 9), 1)})
    start()
    assert listed == [root, root]


def test_each_shard_is_looked_up_once_and_each_filesystem_resolved_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of parts and loaders."""
    root, run_dir = f"memory://shards/{tmp_path.name}", f"memory://runs/{tmp_path.name}"
    for number in range(5):
        members = picture_files(["blue", "red"], 4, seed=number)
        labels = {f"{key.removesuffix('.jpg')}.cls": key.split("/")[0].encode() for key in members}
        storage.write_bytes(f"{root}/s-{number}.tar", tar_of(dict(sorted((members | labels).items()))))
    monkeypatch.setattr(ImageDataModule, "_run_dir", lambda self: run_dir)

    def start() -> ImageDataModule:
        data = ImageDataModule(root=f"{root}/s-{{0..4}}.tar", cache_dir=str(tmp_path / "cache"), global_batch_size=4)
        data.setup("fit")
        return data

    assert set(start().parts) == {"train", "val"}
    looked_up: list[str] = []
    info = storage.info
    monkeypatch.setattr(storage, "info", lambda uri: (looked_up.append(uri), info(uri))[1])
    data = start()
    assert sorted(uri for uri in looked_up if uri.endswith(".tar")) == [f"{root}/s-{n}.tar" for n in range(5)]
    resolved: list[str] = []
    resolve_filesystem = filesystems.filesystem
    monkeypatch.setattr(filesystems, "filesystem", lambda uri: (resolved.append(uri), resolve_filesystem(uri))[1])
    data.train_dataloader()
    data.val_dataloader()
    assert len(resolved) == 2  # each loader asks for one of the shards
