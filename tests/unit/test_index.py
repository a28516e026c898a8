from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from support import index_of, index_parts, picture, picture_files, read, tar_of, write_files

from job import storage
from job.data.index.build import build, split
from job.data.index.index import Index
from job.errors import DataError, StorageError

IMAGE = picture((1, 2, 3), 0)


def test_classes_are_the_sorted_folder_names(tmp_path: Path) -> None:
    write_files(tmp_path, {"b/2.jpg": IMAGE, "a/x/1.PNG": IMAGE, "b/1.webp": IMAGE, "b/notes.txt": b"", "README": b""})
    index = index_of(tmp_path)
    assert index.classes == ("a", "b")
    assert list(zip(index.keys, index.labels, strict=True)) == [("a/x/1.PNG", 0), ("b/1.webp", 1), ("b/2.jpg", 1)]


@pytest.mark.parametrize("uri", ["memory://bucket/data", "file"])
def test_parts_under_one_root(uri: str, tmp_path: Path) -> None:
    root = f"file://{tmp_path}" if uri == "file" else uri
    for part in ("train", "validation", "test"):
        for key, content in picture_files(["blue", "red"], 2).items():
            storage.write_bytes(storage.join(root, "wrapper", part, key), content)
    storage.write_bytes(storage.join(root, "wrapper", "vectorize.py"), b"print()")
    parts = index_parts(root)
    assert {name: len(index) for name, index in parts.items()} == {"train": 4, "val": 4, "test": 4}
    assert read(parts["val"], [0])[0] == picture_files(["blue", "red"], 2)["blue/000.jpg"]


def test_a_root_of_class_folders_is_its_own_train_part(colours: Path) -> None:
    assert index_parts(colours).keys() == {"train"}


def divided(uri: Path, seed: int, fraction: float = 0.2) -> tuple[Index, Index]:
    """(train, val)."""
    folder = Path(tempfile.mkdtemp(prefix="job-test-index-"))
    build({"root": [str(uri)]}, folder, "", "parts")
    split(folder, fraction, seed)
    return Index(folder, "train"), Index(folder, "val")


def test_split_is_stratified_and_stable(tmp_path: Path) -> None:
    write_files(tmp_path, {**picture_files(["blue"], 40), **picture_files(["red"], 10)})
    train, val = divided(tmp_path, seed=1)
    assert [val.labels.tolist().count(c) for c in (0, 1)] == [8, 2]
    assert sorted([*train.keys, *val.keys]) == index_of(tmp_path).keys
    assert divided(tmp_path, seed=1)[1].keys == val.keys
    assert divided(tmp_path, seed=2)[1].keys != val.keys
    # A new image pushes at most one other across, and only to make room.
    write_files(tmp_path, {"blue/new.jpg": IMAGE})
    after = divided(tmp_path, seed=1)[1]
    assert len(set(val.keys) - set(after.keys)) <= 1


def test_other_layouts_are_refused_with_the_reason(tmp_path: Path) -> None:
    def fails(name: str, files: dict[str, bytes]) -> str:
        folder = write_files(tmp_path / name, files)
        with pytest.raises(DataError) as excinfo:
            index_parts(folder)
        return str(excinfo.value)

    assert "no image" in fails("none", {"a/readme.txt": b"x"})
    assert "a single class (a)" in fails("single", {"a/1.jpg": IMAGE})
    assert "outside any class folder, for example 1.jpg" in fails("stray", {"1.jpg": IMAGE, "a/1.jpg": IMAGE})
    assert "both val/ and validation/" in fails(
        "both", {f"{p}/{c}/1.jpg": IMAGE for p in ("train", "val", "validation") for c in "ab"}
    )
    assert "no train/ folder" in fails("no-train", {f"val/{c}/1.jpg": IMAGE for c in "ab"})
    stages = {f"{c}/1.jpg": IMAGE for c in ("dev", "prod", "test")}
    assert "If its folders are classes, give" in fails("stages", stages)
    assert index_of(tmp_path / "stages", layout="classes").classes == ("dev", "prod", "test")


def test_a_table_beside_images_without_folders_is_named(tmp_path: Path) -> None:
    files = {"train/1.jpg": IMAGE, "train/2.jpg": IMAGE, "test/3.jpg": IMAGE}
    root = write_files(tmp_path / "data", {**files, "train.csv": b"id,label\n1,a\n2,b\n", "test/a.csv": b""})
    with pytest.raises(DataError, match=rf"If {root}/train\.csv has their labels, give it"):
        index_parts(root)
    (tmp_path / "a.tar").write_bytes(tar_of({"1.jpg": IMAGE, "train.csv": b""}))
    with pytest.raises(DataError, match=r"one folder per class\.$"):
        index_parts(tmp_path / "a.tar")


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match=r"a\.rar is a file, and its suffix is that of no archive"):
        index_parts(tmp_path / "a.rar")


def test_skipped_files_of_refused_data_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"inner.zip": b""}))
    with pytest.raises(DataError, match="no image"):
        index_parts(tmp_path / "a.tar")
    assert "for example inner.zip" in caplog.text


def test_folders_of_any_depth(tmp_path: Path) -> None:
    for depth in (30, 31, 32, 33, 50):
        root = tmp_path / str(depth)
        write_files(root, {f"{name}/{'d/' * depth}{n}.jpg": b"" for name in ("a", "b") for n in range(2)})
        index = index_of(root)
        assert (len(index), index.classes) == (4, ("a", "b")), depth


def test_a_class_too_small_to_split_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, {"a/1.jpg": IMAGE, "a/2.jpg": IMAGE, "b/1.jpg": IMAGE})
    with pytest.raises(DataError, match="class 'b'"):
        divided(tmp_path, seed=0)


def test_differing_classes_are_named(tmp_path: Path) -> None:
    one = write_files(tmp_path / "one", {"cat/1.jpg": IMAGE, "dog/1.jpg": IMAGE})
    two = write_files(tmp_path / "two", {"cat/1.jpg": IMAGE, "dogs/1.jpg": IMAGE})
    with pytest.raises(
        DataError, match=r"1 image.*two are of class dogs, of which .*one has none; it has class dog instead"
    ):
        build({"train": [str(one)], "val": [str(two)]}, tmp_path, "", "classes")


def test_unlabelled_images(colours: Path) -> None:
    index = index_of(colours, "images")
    assert len(index) == 40
    assert set(index.labels.tolist()) == {-1}
    with pytest.raises(StorageError, match="no such bucket, object or folder"):
        index_of(colours / "nowhere", "images")
    with pytest.raises(DataError, match="no image under"):
        index_of(write_files(colours / "none", {"a.txt": b""}), "images")


def test_a_part_of_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row positions do not depend on the sizes of record batches."""
    monkeypatch.setattr("job.data.index.index.ROWS_PER_BATCH", 7)
    write_files(tmp_path, picture_files(["blue", "green", "red"], 10))
    index = index_of(tmp_path)
    assert [len(batch) for batch in index.batches()] == [7, 7, 7, 7, 2]
    assert index.keys == sorted(picture_files(["blue", "green", "red"], 10))
    assert [index[n].key for n in (0, 6, 7, 29)] == ["blue/000.jpg", "blue/006.jpg", "blue/007.jpg", "red/009.jpg"]
    assert index.labels_of(np.array([29, 0, 15, 7])).tolist() == [2, 0, 1, 0]
    assert index.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_an_index_is_pickled_as_its_path(colours: Path) -> None:
    index = index_of(colours)
    pickled = pickle.dumps(index)
    assert len(pickled) < 300
    received = pickle.loads(pickled)  # noqa: S301  (our own)
    assert received.keys == index.keys
    assert received.fingerprint() == index.fingerprint()


def test_a_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    files = picture_files(["blue", "red"], 3)
    one, other = (index_of(write_files(tmp_path / name, files)).fingerprint() for name in ("one", "other"))
    assert one == other
    write_files(tmp_path / "other", {"red/new.jpg": IMAGE})
    assert index_of(tmp_path / "other").fingerprint() != one
