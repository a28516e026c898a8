"""Tables with any column names, further columns, and formats of other tools."""

from __future__ import annotations

import bz2
import gzip
import json
import time
import tracemalloc
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from support import index_of, index_parts, picture_files, read, write_files

from job.data.index import embedded_images, store
from job.data.index.build import build
from job.data.index.index import Index
from job.data.index.sources.columns import Columns, from_option
from job.errors import ConfigError, DataError

FILES = picture_files(["blue", "red"], 2)
NAMES = list(FILES)


def labels_of(index: Index) -> dict[str, str]:
    return dict(zip(index.keys, (index.classes[label] for label in index.labels), strict=True))


def rows_of(path: Path, columns: str = "") -> dict[str, str]:
    """Labels by key of a table of one part."""
    folder = path.parent / f"index of {path.name}"
    folder.mkdir(exist_ok=True)
    info = build({"root": [str(path)]}, folder, str(path.parent / "cache"), "parts", columns=from_option(columns))
    assert info.parts.keys() == {"train"}
    return labels_of(Index(folder, "train"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "file_name,age,class\na.jpg,1,x\nb.jpg,unknown,y\n"),
        ("a.csv", "Filename;Class\na.jpg;x\nb.jpg;y\n"),
        ("a.csv", "sep=;\r\nfilename;class\r\na.jpg;x\r\nb.jpg;y\r\n"),
        ("a.csv", '\ufeff"Image Path", Label\na.jpg, x\n"b.jpg" , y \n'),
        ("a.csv", ',path,note,label\n0,a.jpg,"two\nlines, and a ""quote""",x\n1,b.jpg,,y\n'),
        ("a.csv", "\n\npath|label\n\na.jpg|x\nb.jpg|y"),
        ("a.tsv", "image\tlabel\na.jpg\tx\nb.jpg\ty\n"),
        ("a.csv", "a.jpg,x\nb.jpg,y\n"),
        ("a.csv", "image,label,path,uri\nq,x,q,a.jpg\nq,y,q,b.jpg\n"),
        ("a.jsonl", '{"img": "a.jpg", "category": "x"}\n{"img": "b.jpg", "category": "y", "more": [{}]}\n'),
        ("a.ndjson", '{"uri": "a.jpg", "label": "x", "path": 1}\n\n{"uri": "b.jpg", "label": "y"}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".zst"])
def test_text_tables_of_any_dialect(name: str, content: str, packed: str, tmp_path: Path) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}.get(
        packed, lambda raw: pa.compress(raw, "zstd", asbytes=True)
    )
    (tmp_path / (name + packed)).write_bytes(compress(content.encode()))
    assert rows_of(tmp_path / (name + packed)) == {"a.jpg": "x", "b.jpg": "y"}


def test_excel_writes_utf16(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("uri\tlabel\na.jpg\tcaf\xe9\nb.jpg\ty\n".encode("utf-16"))
    (tmp_path / "b.csv").write_bytes("a.jpg\tcaf\xe9\nb.jpg\ty\n".encode("utf-16"))
    assert rows_of(tmp_path / "a.csv") == rows_of(tmp_path / "b.csv") == {"a.jpg": "caf\xe9", "b.jpg": "y"}


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
def test_labels_are_read_as_text(file_format: str, tmp_path: Path) -> None:
    labels: list[Any] = ["007", "7", "2020-01-01", "true", "1.50", "None"]
    uris = [f"{n}.jpg" for n in range(len(labels))]
    path = tmp_path / f"a.{file_format}"
    if file_format == "csv":
        path.write_text("uri,label\n" + "".join(f"{u},{v}\n" for u, v in zip(uris, labels, strict=True)))
    elif file_format == "jsonl":
        path.write_text("".join(json.dumps({"uri": u, "label": v}) + "\n" for u, v in zip(uris, labels, strict=True)))
    else:
        pyarrow.parquet.write_table(pa.table({"uri": uris, "label": labels}), path)
    assert list(rows_of(path).values()) == labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([1, 2], pa.int16()), ["1", "2"]),
        (pa.array([1.0, 2.0]), ["1", "2"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([date(2020, 1, 2), date(2021, 1, 2)]), ["2020-01-02", "2021-01-02"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array([b"x", b"y"]), ["x", "y"]),
    ],
)
def test_label_columns_of_any_type(labels: pa.Array, expected: list[str], tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"path": ["a.jpg", "b.jpg"], "label": labels}), tmp_path / "a.parquet")
    assert list(rows_of(tmp_path / "a.parquet").values()) == expected


@pytest.mark.parametrize("missing", ["", "NaN", "nan"])
def test_a_missing_label_is_named(missing: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"uri,label\na.jpg,x\nb.jpg,{missing}\n")
    with pytest.raises(DataError, match=r"row 1 .* has no label"):
        rows_of(tmp_path / "a.csv")
    pyarrow.parquet.write_table(
        pa.table({"uri": ["a.jpg", "b.jpg"], "label": [1.0, float("nan")]}), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match=r"row 1 .* has no label"):
        rows_of(tmp_path / "a.parquet")


def test_splits_in_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "uri,label,split\na.jpg,x,Training\nb.jpg,y,TRAIN\nc.jpg,x,valid\nd.jpg,y,dev\ne.jpg,,test\nf.jpg,x,\n"
    )
    folder = tmp_path / "index"
    folder.mkdir()
    info = build({"root": [str(tmp_path / "a.csv")]}, folder, "", "parts")
    assert {name: part.rows for name, part in info.parts.items()} == {"train": 3, "val": 2}
    assert Index(folder, "train").keys == ["a.jpg", "b.jpg", "f.jpg"]


def test_ambiguous_columns_are_refused_until_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("file_name,url,label,species\na.jpg,q,x,1\nb.jpg,q,y,2\n")
    with pytest.raises(DataError, match=r"file_name, url: which one is the uri\? .*--data\.columns uri=file_name"):
        rows_of(path)
    assert rows_of(path, "uri=file_name,label=species") == {"a.jpg": "1", "b.jpg": "2"}
    with pytest.raises(DataError, match="no column kind; it has file_name, url, label, species"):
        rows_of(path, "uri=file_name,label=kind")
    path.write_text("The file;the class\na.jpg;x\nb.jpg;y\n")
    assert rows_of(path, "uri=The file,label=the class") == {"a.jpg": "x", "b.jpg": "y"}
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a file": "a.jpg", "a label": "x"}\n{"a file": "b.jpg", "a label": "y"}\n')
    assert rows_of(lines, "uri=a file,label=a label") == {"a.jpg": "x", "b.jpg": "y"}


@pytest.mark.parametrize("text", ["uri", "uri=", "name=x", "uri=a,uri=b", "=x"])
def test_malformed_columns_are_refused(text: str) -> None:
    assert from_option(None) == Columns()
    assert str(from_option(" label=b , uri=a")) == "uri=a,label=b"
    with pytest.raises(ConfigError, match=r"--data\.columns takes"):
        from_option(text)


def test_an_index_made_with_other_columns_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uri,label,species\na.jpg,x,1\nb.jpg,y,2\n")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    build({"root": [str(tmp_path / "a.csv")]}, first, "", "parts")
    store.publish_index(first, str(tmp_path / "a.csv.index"))
    info = build({"root": [str(tmp_path / "a.csv")]}, second, "", "parts", columns=Columns(label="species"))
    assert info.classes == ["1", "2"]


@pytest.mark.parametrize("labels", ["x", "x,z"])
def test_import_files_of_vertex_ai_in_csv(labels: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        f"training,gs://bucket/a.jpg,{labels}\nTRAIN,gs://bucket/b.jpg,y\n,gs://bucket/d.jpg,x\n"
        "validation,gs://bucket/e.jpg,y\nTEST,gs://bucket/f.jpg,x\nUNASSIGNED,gs://bucket/g.jpg,y\n"
    )  # fmt: skip
    parts = index_parts(tmp_path / "a.csv")
    assert {name: len(index) for name, index in parts.items()} == {"train": 4, "val": 1, "test": 1}
    assert parts["train"].uri(1) == "gs://bucket/b.jpg"
    assert parts["train"].has_several_labels == ("," in labels)
    (tmp_path / "c.csv").write_text(f"gs://bucket/a.jpg,{labels},train\ngs://bucket/b.jpg,y,test\n")
    with pytest.raises(DataError, match="its last column names parts"):
        index_parts(tmp_path / "c.csv")
    (tmp_path / "b.csv").write_text("gs://bucket/a.jpg,x,0.1,0.2,,,0.3,0.4,,\n")
    with pytest.raises(DataError, match="objects in images"):
        index_parts(tmp_path / "b.csv")


def test_import_files_of_vertex_ai_in_json_lines(tmp_path: Path) -> None:
    def line(name: str, use: str | None, *labels: str) -> str:
        fields: dict[str, Any] = {"imageGcsUri": f"gs://bucket/{name}.jpg"}
        if use is not None:
            fields["dataItemResourceLabels"] = {"aiplatform.googleapis.com/ml_use": use, "other": "1"}
        if len(labels) == 1:
            fields["classificationAnnotation"] = {"displayName": labels[0], "annotationResourceLabels": {}}
        else:
            fields["classificationAnnotations"] = [{"displayName": label} for label in labels]
        return json.dumps(fields) + "\n"

    (tmp_path / "a.jsonl").write_text(
        line("a", "training", "x") + line("b", None, "y") + line("c", "validation", "x") + line("d", "test", "y")
    )
    parts = index_parts(tmp_path / "a.jsonl")
    assert {name: len(index) for name, index in parts.items()} == {"train": 2, "val": 1, "test": 1}
    assert labels_of(parts["train"]) == {"a.jpg": "x", "b.jpg": "y"}
    (tmp_path / "b.jsonl").write_text(line("a", None, "x", "y") + line("b", None, "y", "z"))
    assert index_of(tmp_path / "b.jsonl").has_several_labels


def hugging_face(path: Path, label: Any, rows: int = 4, **columns: Any) -> None:
    """A Parquet file as ``Dataset.push_to_hub`` writes it."""
    pictures = [FILES[NAMES[n % 4]] for n in range(rows)]
    images = pa.array([{"bytes": content, "path": f"{n}.jpg"} for n, content in enumerate(pictures)])
    table = pa.table({"image": images, "label": label, **columns})
    names = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    features = {
        "image": {"_type": "Image"},
        "label": names if table["label"].type == pa.int64() else {"feature": names},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)


def test_parquet_files_with_images(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    hugging_face(path, [0, 1, 1, 0], split=["train", "train", "train", "test"])
    parts = index_parts(path)
    assert labels_of(parts["train"]) == {"0000000.jpg": "cat", "0000001.jpg": "dog", "0000002.jpg": "dog"}
    assert read(parts["train"], [2, 0], tmp_path / "cache") == [FILES[NAMES[2]], FILES[NAMES[0]]]
    assert read(parts["test"], [0], tmp_path / "other node") == [FILES[NAMES[3]]]
    assert index_of(path, layout="images").uri(1) == f"{path}/0000001.jpg"
    hugging_face(path, [[0, 1], [1], [], [0]])
    assert index_of(path).has_several_labels


def test_other_parquet_files_with_images(tmp_path: Path) -> None:
    images = [FILES[name] for name in NAMES]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    masks = pa.array([{"bytes": b"\x89PNG\r\n\x1a\n", "path": None}] * 4, kind)
    table = {"img": images, "mask": masks, "fine_label": ["x", "y", "x", "y"]}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table(table), path)
    assert rows_of(path, "label=fine_label") == dict(zip([f"000000{n}.jpg" for n in range(4)], "xyxy", strict=True))
    other = rows_of(path, "uri=mask,label=fine_label")
    assert list(other) == [f"000000{n}.png" for n in range(4)]
    # Paths as bytes, and images that are not in the file.
    table = {"path": [name.encode() for name in NAMES], "label": ["x", "y", "x", "y"]}
    pyarrow.parquet.write_table(pa.table(table), path)
    assert list(rows_of(path)) == NAMES
    linked = pa.array([{"bytes": None, "path": name} for name in NAMES], kind)
    pyarrow.parquet.write_table(pa.table({"image": linked, "label": ["x", "y", "x", "y"]}), path)
    assert list(rows_of(path)) == NAMES
    # Of a row without an image the sample is bad.
    images_with_null = pa.array([{"bytes": images[0], "path": None}, {"bytes": None, "path": None}], kind)
    pyarrow.parquet.write_table(pa.table({"image": images_with_null, "label": ["x", "y"]}), path)
    assert read(index_of(path), [0, 1], tmp_path / "cache") == [images[0], b""]


@pytest.mark.parametrize("missing", [None, b""])
def test_the_first_image_of_a_parquet_file_may_be_missing(missing: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = [missing, missing, FILES[NAMES[0]], FILES[NAMES[1]]]
    for column in (images, [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)]):
        pyarrow.parquet.write_table(pa.table({"image": column, "label": ["x", "y", "x", "y"]}), path)
        assert read(index_of(path), [0, 2], tmp_path / "cache") == [b"", images[2]]


def test_a_text_that_a_parquet_file_repeats_is_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes of Parquet may repeat a text very often."""
    monkeypatch.setattr("job.data.index.sources.parquet_tables.LONGEST_VALUE", 1 << 10)
    path, rows = tmp_path / "a.parquet", 1 << 13
    pyarrow.parquet.write_table(pa.table({"uri": ["x" * 2000] * rows, "label": ["x"] * rows}), path)
    with pytest.raises(DataError, match="a value has 2,000 bytes"):
        index_of(path)


def test_parquet_files_with_images_are_unpacked_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    large = pa.array([{"bytes": bytes(1 << 20), "path": ""}] * 20)
    pyarrow.parquet.write_table(pa.table({"image": large, "label": ["x", "y"] * 10}), path)
    monkeypatch.setattr("job.data.index.bounded.SMALL_ARCHIVE", 1 << 20)
    with pytest.raises(DataError, match="decompression bomb"):
        embedded_images.extract_images(str(path), path, "image", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size < 13 << 20
    content = bytearray(path.read_bytes())
    content[40:60] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        index_of(path)


@pytest.mark.parametrize("column", ["missing", "number", "struct"])
def test_an_index_may_name_no_other_column_than_one_of_images(column: str, tmp_path: Path) -> None:
    """An index is untrusted data."""
    table = pa.table({"number": [1, 2], "struct": [{"a": 1}, {"a": 2}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="cannot be read"):
        embedded_images.extract_images("a.parquet", tmp_path / "a.parquet", column, tmp_path / "copy")


@pytest.mark.parametrize(
    ("features", "labels"),
    [({"label": {"names": ["cat"]}}, [0, 1]), ({"label": {"names": ["cat", 5]}}, None), ([[]], None), (None, None)],
)
def test_class_names_that_do_not_match_the_labels(features: Any, labels: list[int] | None, tmp_path: Path) -> None:
    table = pa.table({"uri": ["a.jpg", "b.jpg"], "label": [0, 1]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    if labels is not None:
        with pytest.raises(DataError, match="not one of the 1 class names"):
            rows_of(tmp_path / "a.parquet")
    else:
        assert list(rows_of(tmp_path / "a.parquet").values()) == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x" * 100_000, "first line"),
        ("a.csv", b"uri,label\na.jpg,x\n" + b'b.jpg,"' + b"y" * 20_000_000, "cannot be read"),
        ("a.csv", b"a.jpg,x\n" + b"b" * 20_000_000, "longer than"),
        ("a.csv", b"a.jpg," + b"x" * 200_000 + b"\n", "first line|field larger"),
        ("a.csv", b"a.jpg,x\nb.jpg," + b"x" * 200_000 + b"\n", "field larger"),
        ("a.csv", b"uri,label\na.jpg,x\n\xff\xfe.jpg,y\n", "cannot be read"),
        ("a.csv", b"a.jpg,x\n\xff\xfe.jpg,y\n", "cannot be read"),
        ("a.csv", b"\n\n\n", "first line"),
        ("a.csv.gz", b"no gzip", "not a readable archive"),
        ("a.csv.gz", gzip.compress(b"uri,label\na.jpg,x\n" * 1000, mtime=0)[:-30], "not a readable archive"),
        ("a.jsonl.zst", b"no zstd", "not a readable archive|cannot be read"),
        ("a.jsonl", b'{"uri": "a.jpg", "label": "x", "' + b"k" * 9_000_000 + b'": 1}', "longer than"),
        ("a.jsonl", b'{"uri": "a.jpg", "label": ' + b"[" * 5000 + b"]" * 5000 + b"}", "cannot be read"),
        ("a.jsonl", b'{"imageGcsUri": "gs://b/a.jpg", "classificationAnnotation": 5}', "row 0"),
        ("a.jsonl", b'{"imageGcsUri": "gs://b/a.jpg"}', "has no label"),
        ("a.jsonl", b'{"picture": "a.jpg"}', r"no column uri and no label; it has picture"),
        ("a.jsonl", b'{"image": {"bytes": "x"}, "label": 1}', "row 0"),
        ("a.jsonl", b"", "cannot be read"),
    ],
)
def test_malformed_tables_are_refused_within_bounds(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    began = time.process_time()
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        index_of(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
    assert time.process_time() - began < 10


def test_images_of_json_lines_may_be_objects(tmp_path: Path) -> None:
    lines = [
        {"image": {"path": name, "bytes": None}, "label": label} for name, label in zip(NAMES, "xyxy", strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(rows_of(tmp_path / "a.jsonl")) == NAMES
    (tmp_path / "a.jsonl").write_text('{"image": {"bytes": "AA=="}, "label": "x"}')
    with pytest.raises(DataError, match="row 0 \\(from 0\\) has no uri"):
        rows_of(tmp_path / "a.jsonl")


def test_a_field_may_come_late(tmp_path: Path) -> None:
    lines = [{"uri": f"{n}.jpg", "label": "xy"[n % 2], "pad": "p" * 1000} for n in range(6000)]
    lines[-1] |= {"split": "val"}
    lines[-2] |= {"split": None}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {name: len(index) for name, index in index_parts(tmp_path / "a.jsonl").items()} == {"train": 5999, "val": 1}


def test_patterns_of_tables(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{n}.csv": f"uri,label\n{n}.jpg,{'xy'[n]}\n".encode() for n in range(2)})
    index = index_of(f"{tmp_path}/*.csv")
    assert labels_of(index) == {"0.jpg": "x", "1.jpg": "y"}


def test_an_image_that_is_named_again_counts_once(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("uri,label\na.jpg,x\nb.jpg,y\n./a.jpg,x\na.jpg,x\n")
    info = build({"root": [str(table)]}, tmp_path, str(tmp_path / "cache"), "parts")
    assert Index(tmp_path, "train").keys == ["b.jpg", "a.jpg"]
    assert [(each.kind, each.count) for each in info.left_out] == [("rows that name an image again", 2)]
    info = build({"all": [str(table)]}, tmp_path, str(tmp_path / "cache"), "images")
    assert info.parts["all"].rows == 4, "each row gets a prediction"


@pytest.mark.parametrize(
    ("first", "second"), [("x", "y"), (["x", "y"], ["x"]), (["x", "y"], "x")], ids=["labels", "lists", "both"]
)
def test_labels_of_one_image_that_contradict_each_other_are_refused(first: Any, second: Any, tmp_path: Path) -> None:
    rows = [("a.jpg", first), ("b.jpg", "y"), ("c.jpg", "x"), ("a.jpg", second)]
    lines = [json.dumps({"uri": uri, "label": label}) for uri, label in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jpg has the label .* in one row and .* in another"):
        rows_of(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[:3], json.dumps({"uri": "a.jpg", "label": first})]))
    build({"root": [str(tmp_path / "b.jsonl")]}, tmp_path, str(tmp_path / "cache"), "parts")
