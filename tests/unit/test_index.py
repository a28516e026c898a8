from __future__ import annotations

from pathlib import Path

import pytest
from support import picture, picture_files, write_files

from job import storage
from job.data.index import find_parts, index_class_folders, index_unlabelled, require_same_classes, split
from job.errors import DataError, StorageError

IMAGE = picture((1, 2, 3), 0)


def test_classes_are_the_sorted_folder_names(tmp_path: Path) -> None:
    write_files(tmp_path, {"b/2.jpg": IMAGE, "a/x/1.PNG": IMAGE, "b/1.webp": IMAGE, "b/notes.txt": b"", "README": b""})
    index = index_class_folders(str(tmp_path))
    assert index.classes == ("a", "b")
    assert list(zip(index.keys, index.labels, strict=True)) == [("a/x/1.PNG", 0), ("b/1.webp", 1), ("b/2.jpg", 1)]


@pytest.mark.parametrize("uri", ["memory://bucket/data", "file"])
def test_parts_under_one_root(uri: str, tmp_path: Path) -> None:
    root = f"file://{tmp_path}" if uri == "file" else uri
    for part in ("train", "validation", "test"):
        for key, content in picture_files(["blue", "red"], 2).items():
            storage.write_bytes(storage.join(root, "wrapper", part, key), content)
    storage.write_bytes(storage.join(root, "wrapper", "vectorize.py"), b"print()")
    parts = find_parts(root)
    assert {name: len(index) for name, index in parts.items()} == {"train": 4, "val": 4, "test": 4}
    assert storage.read_bytes(parts["val"].uri(0)) == picture_files(["blue", "red"], 2)["blue/000.jpg"]


def test_a_root_of_class_folders_is_its_own_train_part(colours: Path) -> None:
    assert find_parts(str(colours)).keys() == {"train"}


def test_split_is_stratified_and_stable(tmp_path: Path) -> None:
    write_files(tmp_path, {**picture_files(["blue"], 40), **picture_files(["red"], 10)})
    index = index_class_folders(str(tmp_path))
    train, val = split(index, 0.2, seed=1)
    assert [val.labels.count(c) for c in (0, 1)] == [8, 2]
    assert sorted(train.keys + val.keys) == list(index.keys)
    assert split(index, 0.2, seed=1)[1] == val
    assert split(index, 0.2, seed=2)[1] != val
    # A new image pushes at most one other across, and only to make room.
    write_files(tmp_path, {"blue/new.jpg": IMAGE})
    after = split(index_class_folders(str(tmp_path)), 0.2, seed=1)[1]
    assert len(set(val.keys) - set(after.keys)) <= 1


def test_other_layouts_are_refused_with_the_reason(tmp_path: Path) -> None:
    def fails(name: str, files: dict[str, bytes]) -> str:
        folder = write_files(tmp_path / name, files)
        with pytest.raises(DataError) as caught:
            find_parts(str(folder))
        return str(caught.value)

    assert "no image" in fails("none", {"a/readme.txt": b"x"})
    assert "single class folder (a)" in fails("single", {"a/1.jpg": IMAGE})
    assert "outside any class folder, for example 1.jpg" in fails("stray", {"1.jpg": IMAGE, "a/1.jpg": IMAGE})
    assert "both validation/ and val/" in fails(
        "both", {f"{p}/{c}/1.jpg": IMAGE for p in ("train", "val", "validation") for c in "ab"}
    )
    assert "no train/ folder" in fails("no-train", {f"val/{c}/1.jpg": IMAGE for c in "ab"})
    (tmp_path / "hole" / "c").mkdir(parents=True)
    assert "no image in class folder(s) c" in fails("hole", {"a/1.jpg": IMAGE, "b/1.jpg": IMAGE})


def test_a_class_too_small_to_split_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, {"a/1.jpg": IMAGE, "a/2.jpg": IMAGE, "b/1.jpg": IMAGE})
    with pytest.raises(DataError, match="class 'b'"):
        split(index_class_folders(str(tmp_path)), 0.5, seed=0)


def test_differing_classes_are_named(tmp_path: Path) -> None:
    one = index_class_folders(str(write_files(tmp_path / "one", {"cat/1.jpg": IMAGE, "dog/1.jpg": IMAGE})))
    two = index_class_folders(str(write_files(tmp_path / "two", {"cat/1.jpg": IMAGE, "dogs/1.jpg": IMAGE})))
    with pytest.raises(DataError, match=r"only in .*one: dog; only in .*two: dogs"):
        require_same_classes(one, two)


def test_unlabelled_images(colours: Path) -> None:
    assert len(index_unlabelled(str(colours))) == 40
    with pytest.raises(StorageError, match="no such bucket, object or folder"):
        index_unlabelled(str(colours / "nowhere"))
