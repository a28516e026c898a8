"""``python -m job tensorboard``: what TensorBoard's own server answers of runs on disks and in a bucket."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support import run_here

from job import storage
from job.errors import ConfigError, StorageOutage
from job.monitoring.tensorboard import command, event_folders
from job.monitoring.tensorboard.command import arguments, serve, uris_by_name
from job.monitoring.tensorboard.event_folders import EventFile, find_event_files, short_names, tensorboard_argument
from job.monitoring.tensorboard.files import ROOT, RunFiles
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.process.signals import Stopped


def write_run(run_dir: str, value: float = 1.0, steps: int = 3) -> None:
    logger = BucketTensorBoardLogger(f"{run_dir}/tensorboard")
    for step in range(steps):
        logger.log_metrics({"val/accuracy": value}, step)
    logger.finalize("success")
    storage.write_text(f"{run_dir}/checkpoints/epoch=1", "x")
    storage.write_text(f"{run_dir}/report.json", "{}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "RELOAD_SECONDS", 1)
    monkeypatch.setattr(command, "BUCKET_RELOAD_SECONDS", 1)


def eventually(address: str, path: str, is_complete: Callable[[Any], bool], seconds: float = 240) -> Any:
    """The JSON below ``/data/plugin/`` once it is complete."""
    deadline = time.monotonic() + seconds
    while True:
        found = json.load(urllib.request.urlopen(f"{address.rstrip('/')}/data/plugin/{path}"))
        if is_complete(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("uris", "expected"),
    [
        (["/x/runs/1"], ["1"]),
        (["gs://b/runs/1", "gs://b/runs/2"], ["1", "2"]),
        (["gs://b/a/run", "gs://b/b/run"], ["a", "b"]),
        (["gs://b/a/1/out", "gs://b/b/2/out"], ["a/1", "b/2"]),
        (["gs://b/runs", "gs://b/runs/1"], ["runs", "runs/1"]),
        (["gs://b/runs/1", "s3://b/runs/1"], ["gs", "s3"]),
        (["gs://b/runs/1", "/x/runs/1", "gs://c/runs/1"], ["gs/b", "x", "gs/c"]),
        (["gs://b/../..", "gs://b/1"], ["b", "b/1"]),
    ],
)
def test_names_tell_runs_apart(uris: list[str], expected: list[str]) -> None:
    assert short_names(uris) == expected


def test_one_run_given_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert uris_by_name(["1", "./1/", str(tmp_path / "1")]) == {"": str(tmp_path / "1")}


def test_runs_are_found_below_a_folder_and_nothing_else_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1", "a/2", "a/b/3"):
        write_run(str(tmp_path / name))
    (tmp_path / "1" / "features").mkdir()
    (tmp_path / "1" / "features" / "events.out.tfevents.1").touch()
    (tmp_path / "started" / "tensorboard").mkdir(parents=True)
    files = find_event_files(str(tmp_path))
    assert {path.rpartition("/")[0] for path in files} == {"1", "a/2", "a/b/3"}
    assert {path.rpartition("/")[0] for path in find_event_files(str(tmp_path / "1"))} == {""}
    assert {path.rpartition("/")[0] for path in find_event_files(str(tmp_path / "1" / "tensorboard"))} == {""}
    assert find_event_files(str(tmp_path / "absent")) == {}
    monkeypatch.setattr(event_folders, "MOST_ENTRIES", 1)
    assert len(find_event_files(str(tmp_path))) <= 2


def test_a_run_on_vertex_is_shown_from_the_folder_of_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tensorboard_argument("gs://b/1") == "gs://b/1"
    monkeypatch.setenv("AIP_TENSORBOARD_LOG_DIR", "gs://b/1/vertex/logs")
    assert tensorboard_argument("gs://b/1") == "gs://b/1/vertex/logs"


def test_files_are_read_in_parts_as_they_grow(tmp_path: Path) -> None:
    run = tmp_path / "run" / "tensorboard"
    run.mkdir(parents=True)
    (run / "events.out.tfevents.1").write_bytes(b"abcdef")
    (run / "projector_config.pbtxt").write_text("ä")
    files = RunFiles({"x": str(tmp_path / "run")})
    assert files.exists(ROOT)
    assert files.listdir(f"{ROOT}x") == ["events.out.tfevents.1", "projector_config.pbtxt"]
    assert files.isdir(ROOT + "x")
    assert not files.isdir(ROOT + "x/projector_config.pbtxt")
    event_file = f"{ROOT}x/events.out.tfevents.1".encode()
    first, position = files.read(event_file, True, 4)
    rest, position = files.read(event_file, True, 4, position)
    assert (first, rest, files.read(event_file, True, 4, position)[0]) == (b"abcd", b"ef", b"")
    (run / "events.out.tfevents.1").write_bytes(b"abcdefgh")
    assert files.exists(ROOT)
    assert files.read(event_file, True, 16, position)[0] == b"gh"
    assert files.read(ROOT + "x/projector_config.pbtxt")[0] == "ä"
    assert files.stat(event_file).length == 8
    assert files.glob(ROOT + "x/*.pbtxt") == [ROOT + "x/projector_config.pbtxt"]


def test_a_bucket_that_does_not_answer_takes_no_run_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"memory://{uuid.uuid4().hex}/1"
    write_run(uri)
    files = RunFiles({"x": uri})
    files.refresh()
    assert files.runs == ["x"]

    def fails(*_: object, **__: object) -> None:
        raise StorageOutage("503")

    monkeypatch.setattr(storage, "list_pages", fails)
    monkeypatch.setattr(storage.Reader, "read", fails)
    files.refresh()
    files.refresh()
    assert files.runs == ["x"]
    assert caplog.text.count("503") == 1
    (name,) = files.listdir(ROOT + "x")
    with pytest.raises(OSError, match="503"):  # which TensorBoard survives
        files.read(f"{ROOT}x/{name}", True)


def test_a_listing_that_fails_unexpectedly_does_not_end_the_reloads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"memory://{uuid.uuid4().hex}/1"
    write_run(uri)
    files = RunFiles({"x": uri})

    def fails(uri: str) -> dict[str, EventFile]:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("job.monitoring.tensorboard.files.find_event_files", fails)
        assert files.exists(ROOT)
    assert "can't start new thread" in caplog.text
    assert files.exists(ROOT)
    assert files.runs == ["x"]


def test_threads_of_tensorboard_end_silently_with_it(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are daemon threads: while the interpreter ends, a listing fails as here."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has one of its own
    before = set(threading.enumerate())
    is_listing, is_closed = threading.Event(), threading.Event()
    uri = f"memory://{uuid.uuid4().hex}/1"
    write_run(uri)
    with serve([uri], host="localhost", port=0):

        def fails(uri: str) -> dict[str, EventFile]:
            is_listing.set()
            assert is_closed.wait(60)
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

        monkeypatch.setattr("job.monitoring.tensorboard.files.find_event_files", fails)
        assert is_listing.wait(60)
        (reloader,) = [each for each in threading.enumerate() if each not in before and each.name == "Reloader"]
    is_closed.set()
    reloader.join(60)
    assert not reloader.is_alive()
    assert capsys.readouterr().err == ""


def test_a_running_tensorboard_shows_new_points_and_new_runs(quick: None) -> None:
    root = f"memory://{uuid.uuid4().hex}/runs"
    write_run(f"{root}/1")
    with serve([root], host="localhost", port=0) as (address, runs):
        assert runs == ["1"]
        tags = eventually(address, "scalars/tags", bool)
        assert {run: list(names) for run, names in tags.items()} == {"1": ["val/accuracy"]}
        logger = BucketTensorBoardLogger(f"{root}/1/tensorboard", purge_step=3)
        logger.log_metrics({"val/accuracy": 2.0}, 3)
        logger.publish()
        write_run(f"{root}/b/2", 0.5)
        query = "scalars/scalars?" + urllib.parse.urlencode({"run": "1", "tag": "val/accuracy"})
        points = eventually(address, query, lambda found: len(found) == 4)
        assert [(step, value) for _, step, value in points] == [(0, 1), (1, 1), (2, 1), (3, 2)]
        assert set(eventually(address, "scalars/tags", lambda found: len(found) == 2)) == {"1", "b/2"}
        logger.finalize("success")


def test_a_port_that_is_taken_is_one_message(tmp_path: Path) -> None:
    with serve([str(tmp_path)], host="localhost", port=0) as (address, _):
        port = urllib.parse.urlparse(address).port
        again = serve([str(tmp_path)], host="localhost", port=port)
        with pytest.raises(ConfigError, match=rf"cannot listen on localhost, port {port}"), again:
            pass


def test_without_tensorboard_the_message_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.program", None)
    monkeypatch.delattr("tensorboard.program", raising=False)
    outcome = run_here("tensorboard", "runs/1")
    assert (outcome.returncode, "pip install tensorboard" in outcome.output) == (2, True), outcome.output


def test_the_fast_loader_is_never_used(tmp_path: Path) -> None:
    for uris in (["gs://b/runs/1"], [str(tmp_path)], ["s3://b/1", "gs://b/2"]):
        assert {"--logdir=runs://", "--load_fast=false"} <= set(arguments(uris, host="localhost", port=None))


def test_the_command_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise Stopped("stopped by SIGINT.", 130)

    monkeypatch.setattr("job.cli.tensorboard.wait_for_signal", interrupted)
    monkeypatch.setattr(
        "job.cli.tensorboard.serve", lambda *_, **__: nullcontext(("http://localhost:6006/", ["a", "b"]))
    )
    outcome = run_here("tensorboard", str(tmp_path / "a"), tmp_path / "b")
    assert outcome.returncode == 0
    assert "2 run(s): a, b" in outcome.output
    monkeypatch.setattr("job.cli.tensorboard.serve", lambda *_, **__: nullcontext(("http://localhost:6006/", [])))
    assert f"No TensorBoard events yet in {tmp_path}" in run_here("tensorboard", tmp_path).output
