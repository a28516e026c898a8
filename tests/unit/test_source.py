from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from support import index_of, index_parts, picture_files, read, tar_of, write_files, zip_of

from job import storage
from job.data.index.local_copy import materialise
from job.data.index.sources import Source, expand_braces, resolve
from job.errors import ConfigError, DataError, StorageError
from job.storage import objects

FILES = {f"photos/{part}/{key}": c for part in ("train", "val") for key, c in picture_files(["blue", "red"], 2).items()}


def deflated(files: dict[str, bytes]) -> bytes:
    """A streamed zip: sizes and checksums follow the content."""

    class Pipe(io.RawIOBase):
        content = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            Pipe.content += bytes(data)
            return len(data)

    Pipe.content = b""
    with zipfile.ZipFile(Pipe(), "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for key, content in files.items():
            method = zipfile.ZIP_DEFLATED if key.endswith("0.jpg") else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(key), content, method)
    return Pipe.content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.zip", zip_of(FILES)),
        ("b.zip", deflated(FILES)),
        ("a.tar", tar_of(FILES)),
        ("a.tar.gz", tar_of(FILES, "w:gz")),
    ],
)
def test_archives_in_a_bucket_read_like_folders(name: str, content: bytes, tmp_path: Path) -> None:
    storage.write_bytes(f"memory://archives/{name}", content)
    parts = index_parts(f"memory://archives/{name}")
    assert {part: len(index) for part, index in parts.items()} == {"train": 4, "val": 4}
    for part, index in parts.items():
        assert read(index, list(range(4)), tmp_path) == [
            FILES[f"photos/{part}/{k}"]
            for k in sorted(k.removeprefix(f"photos/{part}/") for k in FILES if f"/{part}/" in k)
        ]
    assert parts["train"].uri(3) == f"memory://archives/{name}/photos/train/red/001.jpg"


def test_only_compressed_tars_are_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, cache = tmp_path / "a.tar.gz", tmp_path / "cache"
    archive.write_bytes(tar_of(FILES, "w:gz"))
    fetched = []
    download = storage.download

    def counted(uri: str, target: Path) -> None:
        fetched.append(uri)
        download(uri, target)

    monkeypatch.setattr(objects, "download", counted)
    (source,) = resolve(str(archive)).sources()
    threads = [threading.Thread(target=materialise, args=(source, str(cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    archive.write_bytes(tar_of({**FILES, "photos/train/red/9.jpg": b"x"}, "w:gz"))
    assert materialise(resolve(str(archive)).sources()[0], str(cache)) != materialise(source, str(cache))
    assert len(fetched) == 2
    assert materialise(Source("gs://bucket/a.tar", "tar"), str(cache)) == "gs://bucket/a.tar"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_member_names_are_never_paths(kind: str, tmp_path: Path) -> None:
    """Nothing is unpacked, so ``..`` in a name has no effect."""
    files = {f"a/{c}/../../../{c}.jpg": b"x" for c in "xy"}
    (tmp_path / f"evil.{kind}").write_bytes(zip_of(files) if kind == "zip" else tar_of(files))
    index = index_of(tmp_path / f"evil.{kind}", "images")
    assert read(index, [0, 1]) == [b"x", b"x"]
    assert not list(tmp_path.parent.rglob("[xy].jpg"))


def test_links_and_special_files_are_skipped(tmp_path: Path) -> None:
    buffer = io.BytesIO(tar_of(FILES))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        link = tarfile.TarInfo("photos/train/red/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("photos/train/red/run.sh"), io.BytesIO())
        archive.addfile(tarfile.TarInfo("photos/train/red/._000.jpg"), io.BytesIO())
        archive.addfile(tarfile.TarInfo("__MACOSX/train/red/1.jpg"), io.BytesIO())
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert len(index_parts(tmp_path / "a.tar")["train"]) == 4


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_damaged_archive_is_named(name: str, tmp_path: Path) -> None:
    archive = zip_of(FILES) if name == "a.zip" else tar_of(FILES, "w:gz" if name.endswith("gz") else "w")
    (tmp_path / name).write_bytes(archive[: len(archive) // 2 + 100])
    with pytest.raises(DataError, match=name):
        index_parts(tmp_path / name)


def test_a_damaged_member_is_a_bad_sample(tmp_path: Path) -> None:
    """The central directory is intact, one member is damaged."""
    archive = zip_of(FILES)
    position = archive.index(FILES["photos/train/red/001.jpg"]) + 300
    (tmp_path / "a.zip").write_bytes(archive[:position] + b"?" + archive[position + 1 :])
    samples = read(index_parts(tmp_path / "a.zip")["train"], [2, 3])
    assert samples[0] == FILES["photos/train/red/000.jpg"]
    assert isinstance(samples[1], DataError)
    assert "CRC" in str(samples[1])


def test_a_member_that_expands_without_end_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.index.sources.zip_archive.LARGEST_MEMBER", 1 << 16)
    (tmp_path / "a.zip").write_bytes(deflated({**FILES, "photos/train/red/000.jpg": bytes(1 << 20)}))
    content = read(index_parts(tmp_path / "a.zip")["train"], [2])[0]
    assert isinstance(content, DataError)
    assert "decompression bomb" in str(content)


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    archive = bytearray(zip_of(FILES))
    archive[archive.index(b"PK\1\2") + 8] |= 1  # general purpose flag, bit 0, of the first member in the directory
    (tmp_path / "a.zip").write_bytes(archive)
    with pytest.raises(DataError, match="encrypted"):
        index_parts(tmp_path / "a.zip")


def test_a_wrong_checksum_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tgz").write_bytes(tar_of(FILES, "w:gz"))
    details = {**storage.info(str(tmp_path / "a.tgz")), "md5Hash": "AAAA"}
    monkeypatch.setattr(objects, "info", lambda uri: details)
    with pytest.raises(StorageError, match="does not match its MD5"):
        materialise(resolve(str(tmp_path / "a.tgz")).sources()[0], str(tmp_path / "cache"))


@pytest.mark.skipif(os.geteuid() != 0 and not os.access("/proc", os.W_OK), reason="needs an unwritable place")
def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(tar_of(FILES, "w:gz"))
    with pytest.raises(StorageError, match=r"--data\.cache_dir"):
        materialise(resolve(str(tmp_path / "a.tgz")).sources()[0], "/proc/job-cache")


def test_patterns_name_shards(tmp_path: Path) -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    assert expand_braces("{v1}/{{id}}.tar") == ["{v1}/{{id}}.tar"]
    write_files(tmp_path, {f"s-{n}.tar": tar_of(FILES) for n in range(3)})
    sources = resolve(f"{tmp_path}/s-*.tar").sources()
    assert [source.uri for source in sources] == [f"{tmp_path}/s-{n}.tar" for n in range(3)]
    with pytest.raises(StorageError, match="nothing matches"):
        resolve(f"{tmp_path}/t-*.tar").sources()
    with pytest.raises(StorageError, match=r"s-3\.tar"):
        resolve(f"{tmp_path}/s-{{0..3}}.tar").sources()
    with pytest.raises(ConfigError, match="as a list"):
        resolve(f"{tmp_path}/{{a,b}}").sources()


def webdataset(count: int, label: object, start: int = 0, suffix: str = "cls") -> dict[str, bytes]:
    pictures = list(picture_files(["blue", "red"], count).values())
    shuffled = [pictures[(7 * n) % len(pictures)] for n in range(len(pictures))]
    files = {}
    for n, content in enumerate(shuffled):
        files[f"{start + n:06d}.jpg"] = content
        files[f"{start + n:06d}.{suffix}"] = str(label(n)).encode()  # type: ignore[operator]
        files[f"{start + n:06d}.txt"] = b"a caption"
    return files


def test_webdataset_shards(tmp_path: Path) -> None:
    """Numeric labels are sorted as numbers; adjacent members are read together."""
    shards = {f"t-{s:02d}.tar": tar_of(webdataset(10, lambda n: (5 * n) % 11, 100 * s)) for s in range(3)}
    write_files(tmp_path, shards)
    index = index_of(f"{tmp_path}/t-{{00..02}}.tar")
    assert index.classes == tuple(map(str, range(11)))
    assert len(index) == 60
    assert index.labels[:4].tolist() == [0, 5, 10, 4]
    assert index.info.run_length > 1
    assert read(index, [0]) == [picture_files(["blue", "red"], 10)["blue/000.jpg"]]
    assert index.uri(20) == f"{tmp_path}/t-01.tar/000100.jpg"


def test_json_labels_and_missing_ones(tmp_path: Path) -> None:
    labelled = webdataset(4, lambda n: json.dumps({"label": "ab"[n % 2]}), suffix="json")
    (tmp_path / "j.tar").write_bytes(tar_of(labelled))
    assert index_of(tmp_path / "j.tar").classes == ("a", "b")
    (tmp_path / "m.tar").write_bytes(tar_of({k: c for k, c in labelled.items() if k != "000003.json"}))
    with pytest.raises(DataError, match=r"000003\.jpg has no label"):
        index_of(tmp_path / "m.tar")
    (tmp_path / "k.tar").write_bytes(tar_of({**labelled, "000003.json": b"{"}))
    with pytest.raises(DataError, match=r"000003\.json is no JSON"):
        index_of(tmp_path / "k.tar")


def test_shards_sorted_by_class_are_read_sample_by_sample(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar_of(webdataset(20, lambda n: n // 20)))
    assert index_of(tmp_path / "s.tar").info.run_length == 1


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
def test_manifests(file_format: str, tmp_path: Path) -> None:
    files = picture_files(["blue", "red"], 3)
    write_files(tmp_path, files)
    storage.write_bytes("memory://elsewhere/0.jpg", b"there")
    uris = [*files, "memory://elsewhere/0.jpg", str(tmp_path / "blue/000.jpg")]
    splits = ["train"] * 6 + ["validation", "val"]
    table = pa.table({"uri": uris, "label": ["007"] * 3 + ["7"] * 3 + ["007", "7"], "split": splits})
    target = tmp_path / f"m.{file_format}"
    if file_format == "csv":
        pyarrow.csv.write_csv(table, target)
    elif file_format == "parquet":
        pyarrow.parquet.write_table(table, target)
    else:
        target.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    parts = index_parts(target)
    assert parts["train"].classes == ("007", "7")
    assert read(parts["val"], [0, 1]) == [b"there", files["blue/000.jpg"]]
    assert read(parts["train"], [5]) == [files["red/002.jpg"]]
    assert parts["val"].uri(0) == "memory://elsewhere/0.jpg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("picture,label\na.jpg,x\n", "has no column uri; it has picture, label"),
        ("uri,label\na.jpg,x\nb.jpg,\n", "row 1 .* has no label"),
        ("uri,label,split\na.jpg,x,trian\n", "unknown split 'trian'"),
        ("uri,label\na.jpg,x,z\n", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_invalid_manifests_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        index_parts(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"uri": "a.jpg", "label": "x", "more": ' + b"[" * 100_000 + b"\n", r"row 0 \(from 0\)"),
        ("b.jsonl", b'{"uri": "a.jpg", "label": "x"}\n{"uri": ["a"], "label": "x"}\n', r"row 1 \(from 0\)"),
        ("c.jsonl", b'{"uri": "a.jpg", "label": NaN}\n', "cannot be read"),
        ("d.jsonl", b'{"uri": "' + b"a" * 9_000_000, "longer than"),
        ("e.jsonl", b'"x"\n', "cannot be read"),
        ("f.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("g.csv", b"uri,label\n\xff\xfe.jpg,x\n", "cannot be read"),
        ("h.csv", b"uri,uri,label\na,b,x\n", "cannot be read"),
        ("i.csv", b"uri,label\n" + b"a" * 9000 + b".jpg,x\n", "at most"),
        ("j.csv", b"uri,label\na.jpg," + b"x" * 9000 + b"\n", "at most"),
        ("k.csv", b"uri,label\na\0b.jpg,x\n", "names no file"),
        ("l.csv", b"uri,label\ngs://bucket,x\n", "names no file"),
        ("m.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", "cannot be read"),
        ("n.parquet", b"", "cannot be read"),
    ],
)
def test_malformed_manifests_give_one_message(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        index_parts(tmp_path / name)


def test_columns_of_other_types_are_read_or_refused(tmp_path: Path) -> None:
    """Numbers are labels; in JSON dates and numeric strings stay text."""
    uris = ["a.jpg", "b.jpg"]
    for number, labels in enumerate(
        (pa.array([1, 2]), pa.array([b"a", b"b"]), pa.array(["a", "b"], pa.large_string()))
    ):
        pyarrow.parquet.write_table(pa.table({"uri": uris, "label": labels}), tmp_path / f"{number}.parquet")
        assert len(index_of(tmp_path / f"{number}.parquet").classes) == 2
    for number, labels in enumerate((pa.array([{"x": 1}] * 2), pa.array([b"\xff", b"b"]))):
        pyarrow.parquet.write_table(pa.table({"uri": uris, "label": labels}), tmp_path / f"w{number}.parquet")
        with pytest.raises(DataError, match="cannot be read"):
            index_of(tmp_path / f"w{number}.parquet")
    lines = [{"uri": "a.jpg", "label": "2020-01-01", "split": None}, {"uri": "b.jpg", "label": True}]
    (tmp_path / "d.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)))
    assert index_of(tmp_path / "d.jsonl").classes == ("2020-01-01", "true")


def test_several_roots_are_one_data_set(tmp_path: Path) -> None:
    write_files(tmp_path / "one", picture_files(["blue", "red"], 3))
    (tmp_path / "two.zip").write_bytes(zip_of(picture_files(["blue", "green"], 2, seed=9)))
    index = index_parts(tmp_path / "one", tmp_path / "two.zip")["train"]
    assert index.classes == ("blue", "green", "red")
    assert index.labels.tolist() == [0] * 3 + [2] * 3 + [0] * 2 + [1] * 2
    assert read(index, [0, 9]) == [
        picture_files(["blue", "red"], 3)["blue/000.jpg"],
        picture_files(["blue", "green"], 2, seed=9)["green/001.jpg"],
    ]
