"""Folders of archives, and folders with a table of labels beside the images."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from support import index_of, index_parts, picture_files, read, tar_of, write_files, zip_of

from job.data.index.build import build
from job.data.index.file import load_index_info
from job.data.index.index import Index
from job.data.index.left_out import ARCHIVES
from job.data.index.parts import Layout
from job.data.index.sources.columns import Columns
from job.data.index.store import publish_index
from job.errors import DataError

FILES = picture_files(["blue", "red"], 3)
IMAGES = list(FILES.values())


def shard(start: int, count: int = 3) -> bytes:
    files = {}
    for n in range(start, start + count):
        files |= {f"{n:03}.jpg": IMAGES[n % 6], f"{n:03}.cls": b"%d" % (n % 2)}
    return tar_of(files)


def labels(index: Index) -> list[str]:
    return [index.classes[label] for label in index.labels]


def left_out(root: Path, tmp: Path, layout: Layout = "parts") -> dict[str, int]:
    folder = tmp / "left_out"
    folder.mkdir(exist_ok=True)
    build({"root": [str(root)]}, folder, str(tmp / "cache"), layout, force_listing=True)
    return {kind.kind: kind.count for kind in load_index_info(folder).left_out}


def parquet(path: Path, classes: list[str], images: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array([{"bytes": image, "path": "x"} for image in images])
    pyarrow.parquet.write_table(pa.table({"image": column, "label": classes}), path)


@pytest.mark.parametrize(
    "names",
    [
        ["train-000.tar", "train-001.tar", "val-000.tar"],
        ["train/000.tar", "train/001.tar", "val/000.tar"],
        ["data/imagenet-train-000000.tar", "data/imagenet-train-000001.tar", "data/imagenet-validation-000000.tar"],
        ["Train_0.tar", "Train_1.tar", "Val.tar"],
    ],
)
def test_shards_with_labels(names: list[str], tmp_path: Path) -> None:
    write_files(tmp_path, {name: shard(3 * n) for n, name in enumerate(names)})
    write_files(tmp_path, {"README.md": b"", "000_stats.json": b"{}"})
    parts = index_parts(tmp_path)
    assert {name: len(index) for name, index in parts.items()} == {"train": 6, "val": 3}
    assert labels(parts["train"]) == ["0", "1", "0", "1", "0", "1"]
    assert read(parts["val"], [0]) == [IMAGES[0]]
    assert parts["train"].uri(0) == f"{tmp_path}/{names[0]}/000.jpg"


def test_a_folder_of_shards_is_read_like_a_pattern_of_them(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{n:05}.tar": shard(3 * n) for n in range(3)})
    write_files(tmp_path, {"00000.parquet": b"what img2dataset writes"})
    folder, pattern = index_of(tmp_path), index_of(f"{tmp_path}/{{00000..00002}}.tar")
    assert folder.keys == pattern.keys
    assert folder.labels.tolist() == pattern.labels.tolist()
    assert folder.info.run_length == pattern.info.run_length > 1


@pytest.mark.parametrize("names", ["blue red", "n01440764 n01443537", "train/blue train/red val/blue val/red", "0 1"])
@pytest.mark.parametrize("suffix", ["tar", "zip", "tar.gz"])
def test_an_archive_per_class(names: str, suffix: str, tmp_path: Path) -> None:
    for name in names.split():
        files = {f"{name.rpartition('/')[2]}_{n}.jpg": IMAGES[n] for n in range(3)}
        content = zip_of(files) if suffix == "zip" else tar_of(files, "w:gz" if suffix == "tar.gz" else "w")
        write_files(tmp_path / "data", {f"{name}.{suffix}": content})
    parts = index_parts(tmp_path / "data")
    classes = sorted({name.rpartition("/")[2] for name in names.split()})
    assert parts.keys() == ({"train", "val"} if "/" in names else {"train"})
    for index in parts.values():
        assert index.classes == tuple(classes)
        assert labels(index) == [classes[0]] * 3 + [classes[1]] * 3
        assert read(index, [4], tmp_path) == [IMAGES[1]]


def test_archives_of_class_folders(tmp_path: Path) -> None:
    write_files(tmp_path / "parts", {"train.zip": zip_of(FILES), "val.tar": tar_of(FILES)})
    assert {name: len(index) for name, index in index_parts(tmp_path / "parts").items()} == {"train": 6, "val": 6}
    wrapped = {f"train/{name}": content for name, content in FILES.items()}
    write_files(tmp_path / "wrapped", {"train.zip": zip_of(wrapped), "validation.zip": zip_of(FILES)})
    assert {name: len(index) for name, index in index_parts(tmp_path / "wrapped").items()} == {"train": 6, "val": 6}
    write_files(tmp_path / "one", {"images.zip": zip_of(FILES)})
    assert labels(index_of(tmp_path / "one")) == ["blue"] * 3 + ["red"] * 3
    write_files(tmp_path / "shards", {f"s-{n}.tar": tar_of({name: FILES[name]}) for n, name in enumerate(FILES)})
    assert labels(index_of(tmp_path / "shards")) == ["blue"] * 3 + ["red"] * 3


@pytest.mark.parametrize("pattern", ["*.tar", "{train,val,test}-0.tar"])
def test_a_pattern_of_several_parts(pattern: str, tmp_path: Path) -> None:
    write_files(tmp_path, {"train-0.tar": shard(0), "val-0.tar": tar_of({}), "test-0.tar": tar_of(FILES)})
    write_files(tmp_path, {"val-0.tar": shard(3)})
    parts = index_parts(f"{tmp_path}/{pattern}")
    assert {name: len(index) for name, index in parts.items()} == {"train": 3, "val": 3}
    only = index_parts(f"{tmp_path}/{{val-0,val-0}}.tar", layout="classes")
    assert len(only["all"]) == 6
    write_files(tmp_path, {"c/train.zip": zip_of(FILES), "c/val.zip": zip_of(FILES)})
    assert index_parts(f"{tmp_path}/c/*.zip").keys() == {"train", "val"}


def test_numbered_archives_of_bare_images_are_no_classes(tmp_path: Path) -> None:
    for names in (["shard-0", "shard-1"], ["00000", "00001"]):
        root = tmp_path / names[0]
        write_files(root, {f"{name}.tar": tar_of({f"{name}.jpg": IMAGES[0]}) for name in names})
        with pytest.raises(DataError, match="outside any class folder"):
            index_of(root)
        assert len(index_of(root, layout="images")) == 2


def test_archives_of_parts_and_others_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"train-0.tar": shard(0), "val-0.tar": shard(3), "extra.tar": shard(0)})
    with pytest.raises(DataError, match=r"parts train, val and others, for example extra\.tar"):
        index_parts(tmp_path)


def test_trains_beside_buses_are_a_class(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{name}.zip": zip_of({"1.jpg": IMAGES[0]}) for name in ("train", "bus", "car")})
    assert index_of(tmp_path).classes == ("bus", "car", "train")


def test_archives_beside_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(tmp_path / "data", {**FILES, "extra.zip": zip_of(FILES)})
    with caplog.at_level(logging.WARNING):
        assert left_out(tmp_path / "data", tmp_path) == {ARCHIVES: 1}
    assert "extra.zip" in caplog.text


def test_parquet_files_as_on_the_hub(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for n, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")):
        parquet(root / f"data/{name}.parquet", ["x", "y"], IMAGES[2 * n : 2 * n + 2])
    unlabelled = pa.array([{"bytes": IMAGES[0], "path": "x"}])
    table = pa.table({"image": unlabelled, "label": pa.array([None], pa.string())})
    pyarrow.parquet.write_table(table, root / "data/test-00000-of-00001.parquet")
    write_files(root, {"README.md": b"", ".gitattributes": b""})
    parts = index_parts(root)
    assert {name: len(index) for name, index in parts.items() if name != "test"} == {"train": 4, "val": 2}
    assert read(parts["train"], [3, 0], tmp_path / "cache") == [IMAGES[3], IMAGES[0]]
    assert labels(parts["val"]) == ["x", "y"]
    converted = tmp_path / "converted"
    parquet(converted / "default/train/0000.parquet", ["x", "y"], IMAGES[:2])
    parquet(converted / "default/test/0000.parquet", ["x", "y"], IMAGES[2:4])
    assert index_parts(converted).keys() == {"train", "test"}


def test_a_folder_of_tfrecords(tmp_path: Path) -> None:
    from test_tfrecord import example, framed

    for part, count in (("train", 2), ("validation", 1)):
        for n in range(count):
            record = framed(example(image__encoded=IMAGES[n], image__class__label=0)) + framed(
                example(image__encoded=IMAGES[n + 3], image__class__label=1)
            )
            write_files(tmp_path, {f"{part}-0000{n}-of-0000{count}.tfrecord": record})
    assert {name: labels(index) for name, index in index_parts(tmp_path).items()} == {
        "train": ["0", "1", "0", "1"],
        "val": ["0", "1"],
    }


def test_a_saved_index_of_a_folder_of_archives_is_compared_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, folder = tmp_path / "data", tmp_path / "index"
    folder.mkdir()
    write_files(root, {f"{n:05}.tar": shard(3 * n) for n in range(2)})
    build({"root": [str(root)]}, folder, "", "parts")
    publish_index(folder, str(root / ".index"))
    with caplog.at_level(logging.INFO):
        assert len(index_of(root)) == 6
    assert "using the index of" in caplog.text
    write_files(root, {"00002.tar": shard(6)})
    assert len(index_of(root)) == 9


METADATA = {"0.jpg": "x", "1.jpg": "y", "sub/2.jpg": "x"}


def metadata(file_format: str, rows: dict[str, str], label: str = "label") -> bytes:
    if file_format == "csv":
        return "\n".join([f"file_name,{label}", *(f"{name},{value}" for name, value in rows.items())]).encode()
    table = pa.table({"file_name": list(rows), label: list(rows.values())})
    if file_format == "parquet":
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        return bytes(sink.getvalue())
    return "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
def test_metadata_beside_images_labels_them(file_format: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_files(root, {name: IMAGES[n] for n, name in enumerate([*METADATA, "3.jpg"])})
    write_files(root, {f"metadata.{file_format}": metadata(file_format, METADATA)})
    index = index_of(root)
    assert dict(zip(index.keys, labels(index), strict=True)) == METADATA
    assert read(index, [2]) == [IMAGES[2]]
    assert left_out(root, tmp_path)["images that no metadata file names"] == 1
    assert len(index_of(root, layout="images")) == 4


def test_metadata_in_the_folders_of_parts(tmp_path: Path) -> None:
    for part in ("train", "validation"):
        write_files(tmp_path / "data" / part, {name: IMAGES[n] for n, name in enumerate(METADATA)})
        write_files(tmp_path / "data" / part, {"metadata.csv": metadata("csv", METADATA)})
    parts = index_parts(tmp_path / "data")
    assert {name: labels(index) for name, index in parts.items()} == {"train": ["x", "y", "x"], "val": ["x", "y", "x"]}
    assert parts["val"].uri(2) == f"{tmp_path}/data/validation/sub/2.jpg"


@pytest.mark.parametrize("folder", ["", "data/"])
@pytest.mark.parametrize("absolute", [False, True])
def test_metadata_above_the_folders_of_parts(folder: str, absolute: bool, tmp_path: Path) -> None:
    """No image of a test/ folder is trained on, unless a split column assigns it."""
    names = {"test/3.jpg": "y", "train/0.jpg": "x", "train/1.jpg": "y", "val/2.jpg": "x"}
    root = tmp_path / "data"
    write_files(root, {f"{folder}{name}": IMAGES[n] for n, name in enumerate(names)})
    write_files(root, {f"{folder}metadata.csv": metadata("csv", names)})
    assert {part: index.keys for part, index in index_parts(root).items()} == {
        "train": ["train/0.jpg", "train/1.jpg"],
        "val": ["val/2.jpg"],
        "test": ["test/3.jpg"],
    }
    repeated = {name.removeprefix("train/"): label for name, label in names.items() if name.startswith("train/")}
    if absolute:
        repeated = {f"{root}/{folder}train/{name}": label for name, label in repeated.items()}
    write_files(root, {f"{folder}train/metadata.csv": metadata("csv", repeated)})
    assert len(index_parts(root)["train"]) == 2
    assert left_out(root, tmp_path)["rows that name an image again"] == 2
    write_files(root, {f"{folder}train/metadata.csv": metadata("csv", dict.fromkeys(repeated, "z"))})
    with pytest.raises(DataError, match=r"0.jpg has the label x in one row and z in another"):
        index_of(root)


def test_a_column_missing_in_the_metadata_is_reported(tmp_path: Path) -> None:
    write_files(tmp_path, {**FILES, "metadata.csv": metadata("csv", dict.fromkeys(FILES, "x"))})
    (tmp_path / ".index").mkdir()
    with pytest.raises(DataError, match="has no column species; it has file_name, label"):
        build({"root": [str(tmp_path)]}, tmp_path / ".index", str(tmp_path), "parts", columns=Columns(label="species"))


def test_metadata_without_labels_is_skipped(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_files(root, {**FILES, "metadata.jsonl": metadata("jsonl", dict.fromkeys(FILES, "a caption"), "text")})
    assert labels(index_of(root)) == ["blue"] * 3 + ["red"] * 3
    assert left_out(root, tmp_path) == {"metadata files without a column of labels": 1}
    write_files(root, {"metadata.jsonl": b"{"})
    with pytest.raises(DataError, match=r"metadata\.jsonl cannot be read"):
        index_of(root)
