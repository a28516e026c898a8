"""Unreadable samples: each is counted once; an outage is not a bad sample."""

from __future__ import annotations

import functools
import json
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import (
    TINY,
    index_of,
    options,
    picture,
    picture_files,
    run_here,
    scalars,
    tar_of,
    write_files,
)

from job import storage
from job.cluster import ranks
from job.data import datamodule, fetch
from job.data.bad_samples import BadSample, BadSampleLimit, BadSamples
from job.data.datamodule import ImageDataModule
from job.data.dataset import ImageDataset, Preprocessing
from job.data.index.access import from_options
from job.data.index.build import build
from job.data.index.index import Index
from job.data.sampler import ResumableBatchSampler
from job.errors import ConfigError, DataError, StorageError, StorageOutage


@pytest.mark.parametrize(
    ("value", "sizes", "allowed"),
    [
        (0, {"train": 100}, 0),
        (3, {"train": 100}, 3),
        ("3", {"train": 2}, 3),
        ("0.5%", {"train": 199}, 0),
        ("0.5%", {"train": 200}, 1),
        ("0.5 %", {"train": 1_000}, 5),
        (".1%", {"train": 1_000}, 1),
        ("7%", {"train": 100}, 7),
        ("0%", {"train": 100}, 0),
    ],
)
def test_a_limit_is_a_number_or_a_fraction(value: int | str, sizes: dict[str, int], allowed: int) -> None:
    limit = BadSampleLimit.parse(value, "--data.max_bad_samples")
    bad = {("train", sample): f"gs://b/{sample}.jpg is damaged" for sample in range(allowed)}
    limit.require_few(bad, sizes, "--data.max_bad_samples")
    bad["train", allowed] = "gs://b/last.jpg is damaged"
    with pytest.raises(DataError, match=rf"^{allowed + 1} unreadable .*, {allowed} .*allowed:\n") as excinfo:
        limit.require_few(bad, sizes, "--data.max_bad_samples")
    assert "is damaged\nRepair or remove them, or allow some by --data.max_bad_samples." in str(excinfo.value)


@pytest.mark.parametrize("value", [-1, 0.5, "0.5", "100%", "%", "1e3", "1/2", "", True, "-1%", "\u0663", "9" * 20])
def test_an_invalid_limit_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"--data\.max_bad_samples must be a number such as 10, or a share"):
        ImageDataModule(root="x", max_bad_samples=value)  # type: ignore[arg-type]


def test_a_number_limits_all_parts_and_a_fraction_each_part() -> None:
    bad = {("train", 0): "a", ("val", 0): "b"}
    sizes = {"train": 1000, "val": 100}
    BadSampleLimit.parse(2, "x").require_few(bad, sizes, "x")
    with pytest.raises(DataError, match="2 unreadable"):
        BadSampleLimit.parse(1, "x").require_few(bad, sizes, "x")
    BadSampleLimit.parse("1%", "x").require_few(bad, sizes, "x")
    with pytest.raises(DataError, match=r"1 unreadable image\(s\) of 100 in val, 0 \(0.5%\) allowed:\n  b\n"):
        BadSampleLimit.parse("0.5%", "x").require_few(bad, sizes, "x")


def test_a_sample_is_counted_once_over_epochs_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the second error differs; equal positions in two parts are two samples."""
    sizes = {"train": 10, "val": 10}
    samples = BadSamples(BadSampleLimit(3), "x")
    for line in ("a does not exist", "a is empty"):
        samples.add([BadSample("train", 4, line)], sizes)
    samples.add([BadSample("val", 4, "b is empty")], sizes)
    assert list(samples) == ["a does not exist", "b is empty"]
    others = {BadSample("train", 4, "a is damaged"), BadSample("train", 5, "c is empty")}
    monkeypatch.setattr(ranks, "union", lambda values: values | others)
    samples.share(sizes)
    assert list(samples) == ["a does not exist", "b is empty", "c is empty"]
    others.add(BadSample("train", 6, "d is empty"))
    with pytest.raises(DataError, match="4 unreadable"):
        samples.share(sizes)


def all_of(uri: object, size: int = 16) -> tuple[list[bool], list[str], StorageError | None]:
    """(mask, lines of bad samples, error) of all samples below a URI, in one batch."""
    folder = Path(tempfile.mkdtemp(prefix="job-test-index-"))
    build({"all": [str(uri)]}, folder, str(folder), "classes", access=from_options("127.0.0.1", [str(uri)]))
    index = Index(folder, "all")
    sampler = ResumableBatchSampler(len(index), len(index), rank=0, world_size=1, seed=0, shuffle=False)
    batch = ImageDataset(index, sampler, Preprocessing(size))[sampler.batch(0, 0)]
    error = batch["error"]
    assert error is None or isinstance(error, StorageError)
    return batch["mask"].tolist(), [bad.line for bad in batch["bad"]], error


@pytest.mark.parametrize("root", ["disk", "memory://bad-samples"])
def test_a_row_of_a_table_without_its_file_is_one_bad_sample(root: str, tmp_path: Path) -> None:
    folder = str(tmp_path) if root == "disk" else root
    files = {**picture_files(["blue", "red"], 2), "empty.jpg": b"", "cut.jpg": picture((1, 2, 3), 0)[:300]}
    rows = [*files, "gone/1.jpg", f"{'x' * 300}.jpg", "red"]
    table = "uri,label\n" + "".join(f"{key},{'red' if 'red' in key else 'blue'}\n" for key in rows)
    files["table.csv"] = table.encode()
    if root == "disk":
        write_files(tmp_path, files)
    else:
        storage.write_many(folder, files)
    mask, lines, error = all_of(f"{folder}/table.csv")
    assert error is None
    assert sum(mask) == 4
    text = "\n".join(sorted(lines))
    assert f"{folder}/gone/1.jpg does not exist" in text
    assert f"{folder}/empty.jpg is empty" in text
    assert f"{folder}/cut.jpg is damaged" in text
    assert f"{folder}/red " in text
    assert len(lines) == 5
    assert "Check the spelling" not in text


def test_an_image_that_changed_or_may_not_be_read_is_one_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, picture_files(["blue", "red"], 2))
    index = index_of(tmp_path)
    (tmp_path / "blue/000.jpg").write_bytes(b"other")
    (tmp_path / "red/001.jpg").unlink()
    sampler = ResumableBatchSampler(4, 4, rank=0, world_size=1, seed=0, shuffle=False)
    original = storage.Reader.read

    def read(self: storage.Reader, key: str, *args: int) -> bytes:
        with storage.translate_errors(f"{self.root}/{key}", "read"):
            if key == "red/000.jpg":
                raise PermissionError(13, "Permission denied")
            return original(self, key, *args)

    monkeypatch.setattr(storage.Reader, "read", read)
    batch = ImageDataset(index, sampler, Preprocessing(16))[sampler.batch(0, 0)]
    assert batch["error"] is None
    assert batch["mask"].tolist() == [False, True, False, False]
    changed, denied, gone = (bad.line for bad in batch["bad"])
    assert changed.startswith(f"{tmp_path}/blue/000.jpg has changed since it was listed: 5 bytes, ")
    assert denied.startswith(f"{tmp_path}/red/000.jpg cannot be read: permission denied")
    assert gone == f"{tmp_path}/red/001.jpg does not exist"
    assert [bad[:2] for bad in batch["bad"]] == [("train", 0), ("train", 2), ("train", 3)]


def test_an_archive_that_changed_is_an_error_of_the_data(tmp_path: Path) -> None:
    """All offsets in it are wrong, so it is not one bad sample."""
    (tmp_path / "a.tar").write_bytes(tar_of(picture_files(["blue", "red"], 2)))
    index = index_of(tmp_path / "a.tar")
    sampler = ResumableBatchSampler(4, 4, rank=0, world_size=1, seed=0, shuffle=False)
    (tmp_path / "a.tar").write_bytes(b"short")
    error = ImageDataset(index, sampler, Preprocessing(16))[sampler.batch(0, 0)]["error"]
    assert isinstance(error, StorageError)
    assert "the data changed under the run" in str(error)
    (tmp_path / "a.tar").unlink()
    error = ImageDataset(index, sampler, Preprocessing(16))[sampler.batch(0, 0)]["error"]
    assert isinstance(error, StorageError)


class Handler(BaseHTTPRequestHandler):
    """Answers /STATUS/… with that status."""

    def __init__(self, statuses: list[str], *args: object) -> None:
        self.statuses = statuses
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        status = int(self.path.split("/")[1])
        self.statuses.append(self.path)
        body = picture((200, 40, 30), 0) if status == 200 else b"sorry"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """(URL, paths that were requested) of a web server."""
    paths: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, paths))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()


def test_web_servers(server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing and forbidden files are bad samples, without a retry; server errors are an outage."""
    url, paths = server
    rows = ["200/a.jpg,red", "404/b.jpg,red", "403/c.jpg,blue", "410/d.jpg,blue", "200/e.jpg,blue"]
    (tmp_path / "t.csv").write_text("uri,label\n" + "".join(f"{url}/{row}\n" for row in rows))
    mask, lines, error = all_of(tmp_path / "t.csv")
    assert error is None
    assert sum(mask) == 2
    assert sorted(line.partition(" ")[2][:40] for line in lines) == [
        "cannot be read: permission denied (403, ",
        "does not exist",
        "does not exist",
    ]
    assert len(paths) == 5
    monkeypatch.setattr(fetch, "RETRY_SECONDS", 0.5)
    (tmp_path / "t.csv").write_text(f"uri,label\n{url}/200/a.jpg,red\n{url}/503/b.jpg,blue\n")
    assert isinstance(all_of(tmp_path / "t.csv")[2], StorageOutage)


def test_when_everything_is_missing_the_run_ends_at_once(tmp_path: Path) -> None:
    rows = "".join(f"{number}.jpg,{('red', 'blue')[number % 2]}\n" for number in range(40))
    (tmp_path / "t.csv").write_text(f"uri,label\n{rows}")
    data = ImageDataModule(root=str(tmp_path / "t.csv"), global_batch_size=4, image_size=16, max_bad_samples="20%")
    data.setup("fit")
    with pytest.raises(DataError, match=r"8 unreadable image\(s\) of 32 in train, 6 \(20%\) allowed"):
        for number, batch in enumerate(data.train_dataloader()):
            data.on_before_batch_transfer(batch, 0)
            assert number < 2
    assert all("does not exist" in line for line in data.bad_samples)


def test_the_pixel_limit_of_the_data_module(tmp_path: Path) -> None:
    write_files(tmp_path, picture_files(["blue", "red"], 2))
    with pytest.raises(ConfigError, match=r"--data\.max_image_pixels must be above 0"):
        ImageDataModule(root=str(tmp_path), max_image_pixels=0)
    data = ImageDataModule(root=str(tmp_path), val_fraction=0.5, image_size=16, max_image_pixels=1279)
    assert [data.preprocessing(part).max_image_pixels for part in ("train", "val")] == [1279, 1279]
    assert data.preprocessing("train").flip
    assert datamodule.MAX_IMAGE_PIXELS == 178_956_970


@pytest.fixture(scope="module", params=["always", "never"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with run/ of a fit on a table, one row of which has no file; with and without cached features."""
    folder = tmp_path_factory.mktemp("trained")
    files = picture_files(["blue", "red"], 10)
    write_files(folder, files)
    rows = [*((key, key.split("/")[0]) for key in files), ("gone.jpg", "red")]
    (folder / "t.csv").write_text("uri,label\n" + "".join(f"{key},{label}\n" for key, label in rows))
    settings = {**TINY, "model.milestones": "[2]", "trainer.max_epochs": 2, "features.use": request.param}
    settings |= {"data.root": folder / "t.csv", "data.cache_dir": folder / "cache", "run_dir": folder / "run"}
    result = run_here("fit", *options(settings, **{"data.max_bad_samples": "40%"}))
    assert result.returncode == 0, result.output
    assert result.output.count("gone.jpg does not exist") >= 1
    return folder


def test_a_run_reports_a_missing_image_once(trained: Path) -> None:
    report = json.loads((trained / "run" / "report.json").read_text())
    assert report["bad_samples"] == [f"{trained}/gone.jpg does not exist"]
    assert {count for _, count in scalars(str(trained / "run"))["data/bad_samples"]} <= {0.0, 1.0}


def test_predict_names_and_counts_unreadable_images(trained: Path, tmp_path: Path) -> None:
    keys = ["blue/000.jpg", "red/000.jpg", "blue/001.jpg", "red/001.jpg", "gone.jpg"]
    (trained / "new.csv").write_text("uri\n" + "".join(f"{key}\n" for key in keys))
    command = ("predict", "--ckpt", trained / "run", "--input", trained / "new.csv", "--output", tmp_path / "p.jsonl")
    failed = run_here(*command, "--max_bad_samples", "19%")
    assert failed.returncode == 2
    assert "1 unreadable image(s) of 5, 0 (19%) allowed" in failed.output
    assert f"{trained}/gone.jpg does not exist" in failed.output
    allowed = run_here(*command, "--max_bad_samples", "20%")
    assert allowed.returncode == 0, allowed.output
    assert f"bad sample: {trained}/gone.jpg does not exist" in allowed.output
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["uri"] for line in lines if line.get("error") == "does not exist"] == [f"{trained}/gone.jpg"]
    assert sum("label" in line for line in lines) == 4
    small = run_here(*command, "--max_bad_samples=5", "--max_image_pixels=1279")
    assert small.returncode == 0, small.output
    assert "40 x 32 pixels, more than max_image_pixels" in small.output
