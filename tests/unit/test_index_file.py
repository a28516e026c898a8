"""Untrusted and damaged indexes: refused with one message."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pytest
from support import REPOSITORY, environment, index_parts, picture_files, tar_of, write_files

from job import storage
from job.cli.index import main
from job.data.datamodule import ImageDataModule
from job.data.index.build import build
from job.data.index.file import SCHEMA, IndexInfo, verify_parts
from job.data.index.store import local_index
from job.errors import DataError, JobError
from job.storage.local_cache import read_small

FILES = picture_files(["blue", "red"], 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An index of eight images in a folder."""
    root = write_files(tmp_path / "data", FILES)
    (tmp_path / "index").mkdir()
    build({"root": [str(root)]}, tmp_path / "index", "", "parts")
    return tmp_path / "index"


def change(folder: Path, changed: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite index.json."""
    info = json.loads((folder / "index.json").read_bytes())
    changed(info)
    (folder / "index.json").write_text(json.dumps(info))


def test_a_folder_has_one_state(folder: Path) -> None:
    """Each state costs a listing of the folder."""
    change(folder, lambda info: info["folders"].append(info["folders"][0]))
    with pytest.raises(DataError, match="a folder has two states"):
        local_index(str(folder), folder)


def write_part(folder: Path, table: pa.Table, compression: str | None = None) -> None:
    """Rewrite the training part, and its hash and size in index.json."""
    path = folder / "train.arrow"
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)

    def update(update: dict[str, Any]) -> None:
        content = path.read_bytes()
        hashed = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "rows": len(table)}
        update["parts"]["train"].update(hashed)

    change(folder, update)


def part(**columns: list[Any]) -> pa.Table:
    """Two valid rows, with some columns replaced."""
    rows: dict[str, list[Any]] = {
        "key": ["blue/000.jpg", "red/000.jpg"],
        "source": [0, 0],
        "offset": [-1, -1],
        "size": [-1, -1],
        "version": [0, 0],
        "label": [0, 1],
    }
    return pa.table({**rows, **columns}, schema=SCHEMA)


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        local_index(str(folder), folder.parent / "cache")
    return str(error.value)


@pytest.mark.parametrize("name", ["../../x", "a/b", "/etc/x", "train\n", "", ".", "Train", "x" * 40])
def test_part_names_are_plain(folder: Path, name: str) -> None:
    change(folder, lambda info: info["parts"].update({name: info["parts"]["train"]}))
    assert "index.json is no index" in refused(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda info: info.update(more=1),
        lambda info: info["parts"]["train"].update(more=1),
        lambda info: info["sources"][0].update(kind="executable"),
        lambda info: info["sources"][0].update(uri=["x"]),
        lambda info: info["sources"][0].update(version=2**64),
        lambda info: info["sources"][0].update(version=-1),
        lambda info: info["sources"][0].update(uri="a\0b"),
        lambda info: info["parts"]["train"].update(rows=-1),
        lambda info: info["parts"]["train"].update(rows=10**19),
        lambda info: info["parts"]["train"].update(run_length=0),
        lambda info: info["parts"]["train"].update(run_length=10**9),
        lambda info: info["parts"]["train"].update(mean_bytes=-1),
        lambda info: info["parts"]["train"].update(sha256="x"),
        lambda info: info.update(classes=["a", "a"]),
        lambda info: info.update(classes=["a", 1]),
        lambda info: info.update(parts={}),
        lambda info: info.update(format="2"),
        lambda info: info.pop("created"),
    ],
)
def test_index_json_has_a_schema(folder: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    change(folder, damage)
    assert "python -m job index" in refused(folder)


@pytest.mark.parametrize(
    "text", [b"", b"NaN", b"[" * 100_000, b'{"format": 3, "request": ' + b'{"a":' * 100_000, b"\xff"]
)
def test_invalid_json_gives_one_message(folder: Path, text: bytes) -> None:
    (folder / "index.json").write_bytes(text)
    assert "index.json is no index" in refused(folder)


def test_a_newer_format_is_refused_by_name(folder: Path) -> None:
    change(folder, lambda info: info.update(format=4, more=1))
    assert "has format 4: a newer release of this package wrote it" in refused(folder)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (part(source=[0, 1]), "source"),
        (part(source=[0, -1]), "source"),
        (part(label=[0, 2]), "label"),
        (part(label=[0, -1]), "label"),
        (part(offset=[-2, -1]), "offset"),
        (part(size=[1 << 60, -1]), "size"),
        (part(offset=[5, -1], size=[5, -1]), "an object of its own has one"),
        (part(key=["", "a"]), "length of a key"),
        (part(key=["a" * 9000, "a"]), "length of a key"),
        (part(key=["a\0b", "a"]), "zero byte"),
        (part(key=["../../etc/passwd", "a"]), "leads out"),
        (part(key=["/etc/passwd", "a"]), "leads out"),
        (part(key=[None, "a"]), "missing"),
        (part().drop_columns(["label"]), "its columns"),
        (part().set_column(0, "key", pa.array(["a", "b"], pa.large_string())), "its columns"),
    ],
)
def test_rows_are_checked(folder: Path, rows: pa.Table, reason: str) -> None:
    write_part(folder, part())
    local_index(str(folder), folder.parent / "cache")
    write_part(folder, rows)
    message = refused(folder)
    assert "train.arrow is damaged" in message
    assert reason in message


def test_members_lie_in_archives_and_their_names_mean_nothing(folder: Path) -> None:
    change(folder, lambda info: info["sources"][0].update(kind="tar"))
    write_part(folder, part(key=["../x", "/y"], offset=[512, 0], size=[5, 5]))
    local_index(str(folder), folder.parent / "cache")
    for wrong in (part(), part(offset=[512, 0])):
        write_part(folder, wrong)
        assert "an archive's member has no" in refused(folder)
    change(folder, lambda info: info["sources"][0].update(kind="manifest"))
    write_part(folder, part(offset=[512, 0], size=[5, 5]))
    assert "train.arrow is damaged" in refused(folder)


def test_keys_of_web_servers_do_not_climb(folder: Path) -> None:
    change(folder, lambda info: info["sources"][0].update(uri="https://example.com/data"))
    for key in ("a/../../b", "%2E%2e/b"):
        write_part(folder, part(key=[key, "b?x=../../y"]))
        assert "leads out" in refused(folder)
    write_part(folder, part(key=["a.jpg", "b?x=../../y"]))
    local_index(str(folder), folder.parent / "cache")
    change(folder, lambda info: info["sources"][0].update(uri="gs://bucket"))
    write_part(folder, part(key=["a/../b", "c"]))  # a name like any other there
    local_index(str(folder), folder.parent / "cache")


def test_compressed_parts_are_refused_before_they_expand(folder: Path) -> None:
    write_part(folder, part(), compression="zstd")
    assert "compressed" in refused(folder)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "rows"])
def test_a_part_damaged_in_transfer_is_noticed(damage: str, tmp_path: Path) -> None:
    main(str(write_files(tmp_path / "data", FILES)), output=f"memory://damage/{damage}")
    uri = f"memory://damage/{damage}/train.arrow"
    content = bytearray(storage.read_bytes(uri))
    content[400] ^= 1
    if damage == "gone":
        storage.remove(uri)
    else:
        changed = {"cut": content[:-9], "flip": content, "empty": b"", "rows": content + b"x"}[damage]
        storage.write_bytes(uri, bytes(changed))
    with pytest.raises(DataError, match=r"train\.arrow"):
        index_parts(f"memory://damage/{damage}/index.json")
    with pytest.raises(DataError, match=r"train\.arrow"):
        local_index(f"memory://damage/{damage}", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "index").iterdir() if path.is_dir()]


def test_a_copy_is_verified_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    main(str(write_files(tmp_path / "data", FILES)), output="memory://once")
    verified: list[str] = []

    def counted(folder: Path, info: IndexInfo, uri: str) -> None:
        verified.append(uri)
        verify_parts(folder, info, uri)

    monkeypatch.setattr("job.data.index.store.verify_parts", counted)
    copies = {local_index("memory://once", tmp_path / "cache") for _ in range(3)}
    assert len(verified) == len(copies) == 1
    (copy,) = copies
    assert [oct(path.stat().st_mode & 0o777) for path in (copy, copy / "index.json", copy / "train.arrow")] == [
        "0o700",
        "0o600",
        "0o600",
    ]
    whole = (copy / "train.arrow").read_bytes()
    (copy / "train.arrow").write_bytes(whole[:-1])
    assert local_index("memory://once", tmp_path / "cache") == copy
    assert (copy / "train.arrow").read_bytes() == whole
    assert len(verified) == 2
    assert "is downloaded again" in caplog.text
    monkeypatch.setattr("job.data.index.store.VERIFIED_EACH_TIME", 0)
    write_files(tmp_path / "here", {name: (copy / name).read_bytes() for name in ("index.json", "train.arrow")})
    for _ in range(3):
        local_index(str(tmp_path / "here"), tmp_path / "cache")
    assert len(verified) == 3
    (tmp_path / "here" / "train.arrow").write_bytes(whole[:-1] + b"x")
    with pytest.raises(DataError, match="damaged"):
        local_index(str(tmp_path / "here"), tmp_path / "cache")


@pytest.mark.parametrize("damage", ["json", "arrow", "gone", "older", "newer", "other", "no train"])
def test_a_runs_damaged_index_is_rebuilt_and_a_newer_one_kept(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, run_dir = str(write_files(tmp_path / "data", FILES)), tmp_path / "run"
    monkeypatch.setattr(ImageDataModule, "_run_dir", lambda self: str(run_dir))

    def start() -> ImageDataModule:
        data = ImageDataModule(root=root, cache_dir=str(tmp_path / "cache"))
        data.setup("fit")
        return data

    first = start()
    (index,) = (run_dir / "index").iterdir()
    json_file, arrow = index / "index.json", index / "train.arrow"
    before = json_file.read_bytes()
    if damage == "json":
        json_file.write_bytes(before[: len(before) // 2])
    elif damage == "arrow":
        arrow.write_bytes(arrow.read_bytes()[:-8] + b"12345678")
    elif damage == "gone":
        arrow.unlink()
    else:
        wrong: dict[str, Callable[[dict[str, Any]], object]] = {
            "older": lambda info: info.update(format=1),
            "newer": lambda info: info.update(format=4),
            "other": lambda info: info["request"].update(seed=7),
            "no train": lambda info: info["parts"].pop("train"),
        }
        change(index, wrong[damage])
    if damage == "newer":
        changed = json_file.read_bytes()
        with pytest.raises(DataError, match="format 4: a newer release"):
            start()
        assert json_file.read_bytes() == changed
        return
    assert start().fingerprint() == first.fingerprint()
    assert "the run's index is made again from the data" in caplog.text
    caplog.clear()
    assert start().fingerprint() == first.fingerprint()
    assert "made again" not in caplog.text


def test_an_older_index_beside_the_data_is_ignored_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_files(tmp_path / "data", FILES)
    main(str(root))
    change(root / ".index", lambda info: info.update(format=1))
    assert len(index_parts(root)["train"]) == 8
    assert "older release" in caplog.text
    with pytest.raises(DataError, match="older release"):
        index_parts(root / ".index" / "index.json")


def test_an_endless_index_json_is_not_read(folder: Path) -> None:
    (folder / "index.json").unlink()
    (folder / "index.json").symlink_to("/dev/zero")
    assert "no regular file" in refused(folder) or "not a regular file" in refused(folder)
    (folder / "index.json").unlink()
    with (folder / "index.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "more than the" in refused(folder)


def test_an_index_without_a_training_part_is_named(tmp_path: Path) -> None:
    main(str(write_files(tmp_path / "data", FILES)), output=str(tmp_path / "index"))
    (tmp_path / "index" / "train.arrow").rename(tmp_path / "index" / "test.arrow")
    change(tmp_path / "index", lambda info: info["parts"].update(test=info["parts"].pop("train")))
    with pytest.raises(DataError, match="no training part"):
        index_parts(tmp_path / "index" / "index.json")


@pytest.mark.parametrize("reader", ["index.json", "index.arrow", "labels.arrow", "features", "csv", "jsonl", "parquet"])
def test_mutants_end_in_one_message(reader: str, tmp_path: Path) -> None:
    """In a new process, since a parser in C may crash."""
    result = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "mutants.py", reader, "150", tmp_path],
        env=environment(PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tests'}"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert f"{reader}: 150 mutants, 0 escaped" in result.stdout


def test_a_marker_file_is_small_and_no_link(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"x" * 5000)
    assert read_small(tmp_path / "a") is None
    assert read_small(tmp_path / "b") is None
    assert read_small(tmp_path / "nothing") is None


def test_sources_of_archives_are_checked_after_a_listing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An index that the package has written is accepted."""
    caplog.set_level(logging.INFO)
    (tmp_path / "a.tar").write_bytes(tar_of({f"x/{key}": content for key, content in FILES.items()}))
    main(str(tmp_path / "a.tar"))
    assert len(index_parts(tmp_path / "a.tar")["train"]) == 8
    assert "using the index of" in caplog.text
    assert JobError.exit_code == 2
