"""Real-world data in each kind of source: names, parts, skipped files, links."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import index_of, index_parts, picture, read, tar_of, write_files, zip_of

from job import storage
from job.cli.index import main as index_command
from job.data.datamodule import ImageDataModule
from job.data.index.build import build
from job.data.index.file import IndexInfo
from job.data.index.part_names import part_of
from job.errors import ConfigError, DataError, StorageError
from job.storage.stores.local import LocalDisk

IMAGE = picture((1, 2, 3), 0)
Files = dict[str, bytes]
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def on_disk(files: Files, folder: Path) -> str:
    for key in [key for key in files if key.endswith("/")]:
        (folder / "data" / key).mkdir(parents=True)
    return str(write_files(folder / "data", {key: content for key, content in files.items() if not key.endswith("/")}))


def in_memory(files: Files, folder: Path) -> str:
    for key, content in files.items():
        storage.write_bytes(f"memory://boundary/{folder.name}/{key}", content)
    return f"memory://boundary/{folder.name}"


def zipped(files: Files, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "data.zip").write_bytes(zip_of(files))
    return str(folder / "data.zip")


def tarred(files: Files, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "data.tar").write_bytes(tar_of(files))
    return str(folder / "data.tar")


Pack = Callable[[Files, Path], str]
everywhere = pytest.mark.parametrize("pack", [on_disk, in_memory, zipped, tarred])
archives = pytest.mark.parametrize("pack", [zipped, tarred])


def build_info(uri: str, folder: Path, layout: str = "parts") -> IndexInfo:
    (folder / "index").mkdir(exist_ok=True)
    name = "root" if layout == "parts" else "train"
    return build({name: [uri]}, folder / "index", str(folder), layout)  # type: ignore[arg-type]


def classes(prefix: str = "", names: str = "ab", count: int = 2, start: int = 0) -> Files:
    return {f"{prefix}{name}/{number}.jpg": IMAGE for name in names for number in range(start, start + count)}


def sizes(uri: str) -> dict[str, int]:
    return {part: len(index) for part, index in index_parts(uri).items()}


def left_out(info: IndexInfo) -> dict[str, int]:
    return {kind.kind: kind.count for kind in info.left_out}


# Names


@everywhere
@pytest.mark.parametrize(
    "hidden",
    [
        *("a/.ipynb_checkpoints/0-checkpoint.jpg", "b/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "a/x/.thumbnails/0.jpg"),
        *("__MACOSX/a/._0.jpg", ".Trash-1000/c/0.jpg", "lost+found/#12.jpg", "$RECYCLE.BIN/c/0.jpg", "a/._0.jpg"),
        *("Thumbs.db", "a/desktop.ini", ".DS_Store", "a/#recycle/0.jpg", "System Volume Information/c/0.jpg"),
    ],
)
def test_hidden_files_are_skipped_and_counted(pack: Pack, hidden: str, tmp_path: Path) -> None:
    info = build_info(pack({**classes(), hidden: IMAGE}, tmp_path), tmp_path)
    assert info.classes == ["a", "b"]
    assert info.parts["train"].rows == 4
    assert left_out(info) == {"hidden files and folders": 1}


@archives
@pytest.mark.parametrize("spell", [lambda key: f"./{key}", lambda key: key.replace("/", "\\"), lambda key: f"/{key}"])
def test_spellings_of_archivers(pack: Pack, spell: Callable[[str], str], tmp_path: Path) -> None:
    files = {**classes("train/"), **classes("val/", count=1), "train/a/.hidden.jpg": IMAGE}
    uri = pack({spell(key): content for key, content in files.items()}, tmp_path)
    parts = index_parts(uri)
    assert {part: index.classes for part, index in parts.items()} == {"train": ("a", "b"), "val": ("a", "b")}
    assert sizes(uri) == {"train": 4, "val": 2}
    assert read(parts["train"], [0]) == [IMAGE]


@everywhere
def test_composed_and_decomposed_names_are_one_class(pack: Pack, tmp_path: Path) -> None:
    uri = pack(
        {f"train/{NFD}/0.jpg": IMAGE, f"val/{NFC}/0.jpg": IMAGE, **classes("train/"), **classes("val/")}, tmp_path
    )
    parts = index_parts(uri)
    assert parts["train"].classes == ("a", "b", NFC)
    assert parts["train"].keys[4 if pack is on_disk or pack is in_memory else 0] == f"train/{NFD}/0.jpg"
    sample = parts["train"].keys.index(f"train/{NFD}/0.jpg")
    assert read(parts["train"], [sample]) == [IMAGE]


def test_blanks_around_folders_are_no_part_of_their_names(tmp_path: Path) -> None:
    assert index_of(on_disk({"red /0.jpg": IMAGE, "red/1.jpg": IMAGE, " blue/0.jpg": IMAGE}, tmp_path)).classes == (
        "blue",
        "red",
    )


@archives
def test_a_later_member_of_the_same_name_replaces_the_earlier(pack: Pack, tmp_path: Path) -> None:
    new = picture((200, 0, 0), 1)
    uri = pack({"a/0.jpg": IMAGE, "b/0.jpg": IMAGE, "./a/0.jpg": new}, tmp_path)
    index = index_of(uri)
    assert index.keys == ["b/0.jpg", "./a/0.jpg"]
    assert read(index, [1]) == [new]
    info = build_info(uri, tmp_path)
    assert left_out(info) == {"members that a later one of the same name replaces": 1}


@pytest.mark.parametrize("pack", [on_disk, in_memory])
def test_copies_under_another_spelling(pack: Pack, tmp_path: Path) -> None:
    """Only of equal size: others are distinct images."""
    uri = pack({**classes(), f"a/{NFC}.jpg": IMAGE, f"a/{NFD}.jpg": IMAGE, f"b/{NFC}.jpg": IMAGE}, tmp_path)
    storage.write_bytes(f"{uri}/b/{NFD}.jpg", picture((9, 200, 9), 5))
    info = build_info(uri, tmp_path)
    assert info.parts["train"].rows == 4 + 1 + 2
    assert left_out(info) == {"copies under another spelling of the same name": 1}


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = on_disk(classes(), tmp_path)
    for name in (b"caf\xe9.txt", b"caf\xe9.jpg"):
        Path(root, "a", os.fsdecode(name)).write_bytes(IMAGE)
    info = build_info(root, tmp_path)
    assert info.parts["train"].rows == 4
    (kind,) = info.left_out
    assert (kind.kind, kind.count) == ("files whose names are not UTF-8", 2)
    assert kind.example in ("a/caf%E9.txt", "a/caf%E9.jpg")
    lost = Path(root, os.fsdecode(b"caf\xe9"))
    lost.mkdir()
    (lost / "0.jpg").write_bytes(IMAGE)
    with pytest.raises(DataError, match=r"caf%E9 cannot be read .*not UTF-8"):
        build_info(root, tmp_path)


def test_members_whose_names_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    uri = tarred({**classes(), f"{name}/0.jpg": IMAGE}, tmp_path)
    assert index_of(uri).classes == ("a", "b", "caf%E9")


def test_spellings_of_one_label(tmp_path: Path) -> None:
    table = tmp_path / "l.jsonl"
    rows = [
        {"uri": "0.jpg", "label": [NFC, "b "]},
        {"uri": "1.jpg", "label": [f" {NFD}"]},
        {"uri": "2.jpg", "label": []},
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    assert index_parts(table)["train"].classes == ("b", NFC)
    table.write_text(f"""{{"uri": "0.jpg", "label": "{NFC} "}}\n{{"uri": "1.jpg", "label": "{NFD}"}}\n""")
    with pytest.raises(DataError, match="a single class"):
        index_parts(table)


# What is left out


@everywhere
def test_skipped_files_are_logged(pack: Pack, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    uri = pack({**classes(), "a/readme.md": b"x", "b/Thumbs.db": b"x", "classes.txt": b"x"}, tmp_path)
    info = build_info(uri, tmp_path)
    assert left_out(info) == {"notes and metadata": 2, "hidden files and folders": 1}
    (line,) = [record for record in caplog.records if "left out" in record.message]
    assert line.levelno == logging.INFO
    assert "hidden files and folders: 1, for example b/Thumbs.db" in line.message
    caplog.clear()
    uri = pack({**classes(), "a/clip.mp4": b"x", "b/0004": b"x"}, tmp_path / "more")
    info = build_info(uri, tmp_path)
    assert left_out(info)["files without an image's suffix"] == 2
    (line,) = [record for record in caplog.records if "left out" in record.message]
    assert line.levelno == logging.WARNING


def test_predict_logs_skipped_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = index_of(on_disk({"0.jpg": IMAGE, "x/1.jpg": IMAGE, "x/2": b"x", ".git/3.jpg": IMAGE}, tmp_path), "images")
    assert len(index) == 2
    assert "files without an image's suffix: 1, for example x/2" in caplog.text


def test_hidden_files_in_a_table_are_kept(tmp_path: Path) -> None:
    root = on_disk({"a/0": IMAGE, "a/.1.jpg": IMAGE, "b/2": IMAGE}, tmp_path)
    Path(root, "l.csv").write_text("uri,label\na/0,a\na/.1.jpg, a \nb/2,b\n")
    assert len(index_of(f"{root}/l.csv", "images")) == 3
    index = index_of(f"{root}/l.csv")
    assert (len(index), index.classes) == (3, ("a", "b"))


# Parts


@everywhere
@pytest.mark.parametrize(
    "names",
    [
        {"train": "Training", "test": "Testing"},
        {"train": "train", "val": "valid", "test": "test"},
        {"train": "Train", "val": "Val"},
        {"train": "TRAIN", "val": "dev", "test": "eval"},
        {"train": "seg_train/seg_train", "test": "seg_test/seg_test"},
        {"train": "train2017", "val": "val2017"},
        {"train": "Train Data", "test": "Test Data"},
        {"train": "train_images", "val": "images-val"},
        {"train": "dataset/training_set", "test": "dataset/test_set"},
        {"train": "archive/data/trainset", "val": "archive/data/validset"},
        {"train": "train/train", "val": "val/val"},
        {"train": "birds_train", "val": "birds_val"},
        {"train": "train/train", "val": "train/val"},
        {"train": "images/train", "val": "images/val"},
    ],
)
def test_parts_by_their_usual_names(pack: Pack, names: dict[str, str], tmp_path: Path) -> None:
    files = {key: content for name in names.values() for key, content in classes(f"{name}/").items()}
    uri = pack({**files, "labels/train/a.txt": b"x", "LICENSE": b"x"}, tmp_path)
    parts = index_parts(uri)
    assert {part: index.classes for part, index in parts.items()} == dict.fromkeys(names, ("a", "b"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["set1_train", "set2_train"], "set1_train/ and set2_train/"),
        (["fold1", "fold2", "fold3"], "fold1/, fold2/ and fold3/"),
        (["train", "fold_0"], "train/ and fold_0/"),
        (["train", "training", "val"], "both train/ and training/"),
        (["trainA", "trainB", "testA"], "trainA/"),
        (["train", "val", "dev"], "both dev/ and val/"),
        (["val", "test"], "val/ and test/ but no train/ folder"),
        (["train", "holdout"], "train/ and holdout/ with folders of the same names"),
        (["public", "private"], "private/ and public/, and each of them a/ and b/: which are the classes"),
        (["cats_train", "cats_test", "dogs_train", "dogs_test"], "cats_test/"),
        (["train", "train_extra"], "train/ and train_extra/"),
    ],
)
def test_ambiguous_parts_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    uri = on_disk({key: IMAGE for name in names for key in classes(f"{name}/")}, tmp_path)
    with pytest.raises(DataError) as excinfo:
        index_parts(uri)
    assert message in str(excinfo.value)
    assert "--data.train" in str(excinfo.value)


@pytest.mark.parametrize(
    "names", [["bus", "car", "train"], ["passenger_train", "freight_train"], ["test_tube", "beaker"], ["set1", "set2"]]
)
def test_classes_whose_names_sound_like_parts(names: list[str], tmp_path: Path) -> None:
    uri = on_disk({f"{name}/{number}.jpg": IMAGE for name in names for number in range(2)}, tmp_path)
    assert index_of(uri).classes == tuple(sorted(names))


@everywhere
def test_parts_below_classes(pack: Pack, tmp_path: Path) -> None:
    files = {f"{name}/{part}/{n}.jpg": IMAGE for name in "ab" for part, n in (("train", 0), ("train", 1), ("val", 2))}
    parts = index_parts(pack(files, tmp_path))
    assert {part: (len(index), index.classes) for part, index in parts.items()} == {
        "train": (4, ("a", "b")),
        "val": (2, ("a", "b")),
    }
    assert parts["val"].labels.tolist() == [0, 1]
    mixed = pack({**files, "a/other/3.jpg": IMAGE}, tmp_path / "mixed")
    with pytest.raises(DataError, match=r"hold other/, train/ and val/: which images are for training"):
        index_parts(mixed)


def test_a_flat_test_folder_beside_classes_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"test/ beside bus/ and car/, which may be classes: is it one, too"):
        index_of(on_disk({f"{name}/0.jpg": IMAGE for name in ("bus", "car", "test")}, tmp_path / "test"))
    index_of(on_disk({f"{name}/0.jpg": IMAGE for name in ("bus", "car", "train")}, tmp_path / "train"))
    assert "train/ is taken for a class" in caplog.text


def test_a_part_given_by_its_own_option(tmp_path: Path) -> None:
    """Naming the folder as one part resolves the ambiguity."""
    nested = on_disk(classes("left/") | classes("right/"), tmp_path / "nested")
    assert index_parts(nested, layout="classes")["all"].classes == ("left", "right")
    whole = on_disk(classes("d/train/") | classes("d/val/"), tmp_path / "whole")
    with pytest.raises(DataError, match=r"holds train/ and val/: give it by --data\.root"):
        index_parts(whole, layout="classes")


def test_classes_that_differ_by_case(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index_of(on_disk(classes(names="abA"), tmp_path))
    assert "the classes A, a differ by upper and lower case only" in caplog.text


def test_images_outside_the_parts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {**classes("d/train/"), **classes("d/val/"), **classes("d/unsup/"), "banner.png": IMAGE, "d/x.png": IMAGE}
    info = build_info(on_disk(files, tmp_path), tmp_path)
    assert {part: each.rows for part, each in info.parts.items()} == {"train": 4, "val": 4}
    assert left_out(info) == {"images outside the folders of the parts": 6}
    assert "for example d/unsup/" in caplog.text


@pytest.mark.parametrize(
    ("folder", "part"),
    [
        ("Valid", "val"),
        ("VALIDATION", "val"),
        ("dev-set", "val"),
        ("trn", "train"),
        ("train_512x512", None),
        ("TrainImages", "train"),
        ("imagesTr", None),
        ("traindata", "train"),
        ("test-2", "test"),
        ("train_val", None),
        ("validity", None),
        ("contest", None),
        ("training", "train"),
        ("trains", None),
    ],
)
def test_words_of_parts(folder: str, part: str | None) -> None:
    assert part_of(folder) == part


# What is not needed cannot veto


@everywhere
@pytest.mark.parametrize(
    ("test_files", "reason"),
    [
        ({"test/0.jpg": IMAGE, "test/1.jpg": IMAGE}, r"2 image\(s\) outside any class folder"),
        ({"test/unknown/0.jpg": IMAGE}, r"1 image\(s\) of .* are of class unknown"),
        ({"test/x/0.jpg": IMAGE, "test/a/0.jpg": IMAGE, "test/1.jpg": IMAGE}, "outside any class folder"),
        ({"test1/a/0.jpg": IMAGE, "test2/a/0.jpg": IMAGE}, "both test1/ and test2/"),
        ({"test/sample.txt": b"x"}, "no image under"),
    ],
)
def test_an_unusable_test_part_is_skipped(
    pack: Pack, test_files: Files, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = pack({**classes("train/"), **classes("val/"), **test_files}, tmp_path)
    info = build_info(uri, tmp_path)
    assert info.parts.keys() == {"train", "val"}
    assert info.classes == ["a", "b"]
    assert "the data has no test part" in caplog.text
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(info.absent["test"])


def test_the_test_command_explains_a_missing_test_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a listing, the run's index and an index beside the data."""
    root = on_disk({**classes("train/"), **classes("val/"), "test/0.jpg": IMAGE}, tmp_path)
    for number, ahead in enumerate((False, False, True)):
        if ahead:
            index_command(root)
        run_dir = str(tmp_path / f"run-{number // 2}")
        monkeypatch.setattr(ImageDataModule, "_run_dir", lambda self, run_dir=run_dir: run_dir)
        data = ImageDataModule(root=root, cache_dir=str(tmp_path / "cache"))
        data.setup("fit")
        with pytest.raises(DataError, match=r"no test part \(.*1 image\(s\) outside any class folder.*--data\.test"):
            data.test_dataloader()


def test_a_class_that_validation_lacks_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = build_info(on_disk({**classes("train/", "abc"), **classes("val/", "ab")}, tmp_path), tmp_path)
    assert info.classes == ["a", "b", "c"]
    assert info.parts["val"].rows == 4
    assert "the val part has no image of class c" in caplog.text


def test_one_class_is_enough_for_validation(tmp_path: Path) -> None:
    parts = index_parts(on_disk({**classes("train/"), "val/b/deep/0.jpg": IMAGE}, tmp_path))
    assert (parts["val"].classes, parts["val"].labels.tolist()) == (("a", "b"), [1])


def test_a_class_that_training_lacks_is_an_error(tmp_path: Path) -> None:
    uri = on_disk({**classes("train/", "ab"), **classes("val/", "abc", count=3), "train/c/": b""}, tmp_path)
    with pytest.raises(DataError, match=r"the val part cannot be used: 3 image\(s\) of .*val.* are of class c"):
        index_parts(uri)


def test_messages_about_tables_do_not_mention_folders(tmp_path: Path) -> None:
    table = tmp_path / "l.csv"
    table.write_text("uri,label,split\n0.jpg,a,train\n1.jpg,b,train\n2.jpg,c,val\n")
    with pytest.raises(DataError, match="are of class c") as excinfo:
        index_parts(table)
    assert "folder" not in str(excinfo.value)
    table.write_text("uri,label\n0.jpg,a\n1.jpg,a\n")
    with pytest.raises(DataError, match=r"a single class \(a\)") as excinfo:
        index_parts(table)
    assert "folder" not in str(excinfo.value)


def test_empty_class_folders_are_reported_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = build_info(on_disk({**classes(), "c/": b"", "d/notes.txt": b"x"}, tmp_path), tmp_path)
    assert info.classes == ["a", "b"]
    assert "folders without an image: 2, for example c/" in caplog.text


def denied(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    list_folder = LocalDisk.list_folder

    def guarded(self: LocalDisk, folder: str) -> list[dict[str, object]]:
        if folder.endswith(name):
            raise PermissionError(13, "Permission denied", folder)
        return list_folder(self, folder)

    monkeypatch.setattr(LocalDisk, "list_folder", guarded)


def test_unreadable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Beside parts they are reported and skipped; beside classes they are an error, since one may be a class."""
    parts = on_disk({**classes("train/"), **classes("val/"), "private/x": b""}, tmp_path / "parts")
    alone = on_disk({**classes(), "private/x": b"", "lost+found/x": b""}, tmp_path / "alone")
    denied(monkeypatch, "lost+found")
    assert sizes(alone) == {"train": 4}
    denied(monkeypatch, "private")
    assert left_out(build_info(parts, tmp_path)) == {"unreadable folders": 1}
    assert "unreadable folders: 1, for example private/" in caplog.text
    with pytest.raises(DataError, match=r"private cannot be read .*may be a class"):
        index_parts(alone)
    denied(monkeypatch, "data")
    with pytest.raises(StorageError, match=r"permission denied .*Give the user that the job runs as"):
        index_parts(alone)


# Links


def test_links_are_followed(tmp_path: Path) -> None:
    root = Path(on_disk(classes(), tmp_path))
    write_files(tmp_path / "disk2", {"c/0.jpg": IMAGE, "c/1.jpg": picture((9, 9, 9), 1)})
    (root / "c").symlink_to(tmp_path / "disk2" / "c")
    (root / "a" / "9.jpg").symlink_to(tmp_path / "disk2" / "c" / "1.jpg")
    index = index_of(root)
    assert index.classes == ("a", "b", "c")
    assert index.keys == ["a/0.jpg", "a/1.jpg", "a/9.jpg", "b/0.jpg", "b/1.jpg", "c/0.jpg", "c/1.jpg"]
    assert read(index, [2]) == [picture((9, 9, 9), 1)]


def test_cycles_and_broken_links_are_counted(tmp_path: Path) -> None:
    root = Path(on_disk(classes(), tmp_path))
    for place, target in (("a/up", ".."), ("a/above", "../.."), ("b/self", "self"), ("b/gone.jpg", "nowhere.jpg")):
        (root / place).symlink_to(target)
    (root / "a" / "b").symlink_to("../b")  # and back again
    (root / "b" / "a").symlink_to("../a")
    os.mkfifo(root / "b" / "pipe.jpg")
    info = build_info(str(root), tmp_path)
    counts = left_out(info)
    assert counts["broken links"] == 4  # two of them seen through each other's link
    assert counts["links to a folder that holds them"] >= 4
    assert counts["devices, pipes and sockets"] == 2
    assert info.parts["train"].rows == 8


# All sources alike

names = st.sampled_from(["cat", "Dog", NFC, NFD, "red fox", "0", "10", "train", "x-test"])
keys = st.builds(
    lambda part, name, inner, file: "/".join(filter(None, (part, name, inner, file))),
    st.sampled_from(["train", "Valid", "test"]),
    names,
    st.sampled_from(["", "", "deep", ".hidden"]),
    st.sampled_from(["0.jpg", "1.JPG", "2.png", "3.webp", "._0.jpg", "notes.txt", "4"]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(keys, min_size=4, max_size=40, unique=True))
def test_a_folder_its_archives_and_its_table_agree(tmp_path_factory: pytest.TempPathFactory, listed: list[str]) -> None:
    folder = tmp_path_factory.mktemp("alike")
    files = dict.fromkeys(sorted(listed), IMAGE)
    results = [outcome(pack(files, folder)) for pack in (on_disk, in_memory, zipped, tarred)]
    assert all(result == results[0] for result in results)
    if isinstance(results[0], dict):
        rows = io.StringIO()
        writer = csv.writer(rows)
        writer.writerow(["uri", "label", "split"])
        for part, samples in results[0].items():
            writer.writerows([(f"data/{key}", label, part) for key, label in samples])
        (folder / "l.csv").write_text(rows.getvalue())
        from_table = outcome(str(folder / "l.csv"))
        assert from_table == {
            part: [(f"data/{key}", label) for key, label in samples] for part, samples in results[0].items()
        }


def outcome(uri: str) -> dict[str, list[tuple[str, str]]] | str:
    """(key, class) of all samples by part; or the kind of failure."""
    try:
        parts = index_parts(uri)
    except DataError as error:
        return type(error).__name__
    return {
        part: sorted((key, index.classes[label]) for key, label in zip(index.keys, index.labels, strict=True))
        for part, index in parts.items()
    }


@pytest.mark.parametrize("options", [{"root": ""}, {"root": []}, {"train": "", "val": "images"}])
def test_an_empty_uri_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"--data\.{next(iter(options))} is empty"):
        ImageDataModule(**options)
