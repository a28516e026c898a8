"""Event files: read by TensorBoard's own readers, and written rarely."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing import directory_watcher, event_file_loader, io_wrapper
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job import storage
from job.errors import LeaseError, StorageError, StorageOutage
from job.monitoring.tensorboard import events
from job.monitoring.tensorboard.events import EventFiles, EventWriter, number_of, renumbered
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.process import temporary


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return f"memory://{uuid.uuid4().hex}/tensorboard"


def copy(uri: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for entry in storage.list_files(uri):
        storage.download(storage.join(uri, entry.key), folder / entry.key)
    return folder


def scalars(folder: Path, tag: str = "a") -> list[tuple[int, float]]:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def names(uri: str) -> list[str]:
    return [entry.key for entry in storage.list_files(uri)]


def test_everything_that_a_summary_writer_can_write(tmp_path: Path) -> None:
    """Fails if torch writes its files elsewhere."""
    files = EventFiles(tmp_path)
    writer = EventWriter(files, purge_step=0)
    for step in range(30):
        writer.add_scalar("a", step / 8, step)
        if step % 10 == 9:
            files.cut()
    writer.add_histogram("h", np.arange(10.0), 1)
    writer.add_image("i", np.zeros((3, 4, 4), dtype=np.uint8), 1)
    writer.add_text("t", "text", 1)
    writer.close()
    writer.add_scalar("a", 99.0, 30)  # opens the next file
    writer.flush()
    assert len(list(tmp_path.iterdir())) == 5
    assert scalars(tmp_path) == [*((step, step / 8) for step in range(30)), (30, 99.0)]
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    tags = reader.Tags()
    assert (tags["histograms"], tags["images"], tags["tensors"]) == (["h"], ["i"], ["t/text_summary"])


def test_threads_may_write_while_files_are_rotated(tmp_path: Path) -> None:
    files = EventFiles(tmp_path)
    writer = EventWriter(files, purge_step=0)

    def write(tag: str) -> None:
        for step in range(300):
            writer.add_scalar(tag, 1.0, step)

    threads = [threading.Thread(target=write, args=(tag,)) for tag in "abc"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        files.cut()
        time.sleep(0.002)
    files.cut()
    assert all(len(scalars(tmp_path, tag)) == 300 for tag in "abc")


def test_a_running_tensorboard_sees_each_event_once(bucket: str, tmp_path: Path) -> None:
    """TensorBoard reads while objects appear, and never returns to an earlier name."""
    folder = tmp_path / "watched"
    folder.mkdir()
    watcher = directory_watcher.DirectoryWatcher(
        str(folder), event_file_loader.EventFileLoader, io_wrapper.IsTensorFlowEventsFile
    )
    logger = BucketTensorBoardLogger(bucket)
    read_steps: list[int] = []
    for step in range(20):
        logger.log_metrics({"a": 1.0}, step)
        logger.publish()
        copy(bucket, folder)
        read_steps += [event.step for event in watcher.Load() if event.HasField("summary")]
    logger.finalize("success")
    assert read_steps == list(range(20))
    assert not watcher.OutOfOrderWritesDetected()


def test_no_object_is_written_twice(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    original = storage.write_bytes

    def record(uri: str, *args: object) -> None:
        written.append(uri)
        original(uri, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "write_bytes", record)
    for start in range(2):
        logger = BucketTensorBoardLogger(bucket, purge_step=20 * start)
        for step in range(20):
            logger.log_metrics({"a": float(step)}, 20 * start + step)
            logger.publish()
            logger.publish()  # nothing new: no object
        logger.finalize("success")
    assert len(written) == len(set(written)) == len(names(bucket)) == 40
    assert [step for step, _ in scalars(copy(bucket, tmp_path / "copy"))] == list(range(40))
    assert not list(tmp_path.glob("job-*"))


def test_a_start_on_a_machine_whose_clock_is_behind_continues_the_order(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for start, clock in enumerate((now, now - 5000)):
        monkeypatch.setattr(events.time, "time", lambda clock=clock: clock)
        logger = BucketTensorBoardLogger(bucket, purge_step=6 * start)
        for step in range(6 * start, 10 + 4 * start):  # the second start repeats steps 6 to 9
            logger.log_metrics({"a": float(start)}, step)
            logger.publish()
        logger.finalize("success")
    assert scalars(copy(bucket, tmp_path / "copy")) == [(s, 0.0) for s in range(6)] + [(s, 1.0) for s in range(6, 14)]


@pytest.mark.parametrize("refused", ["the first answer is lost", "the bucket is away"])
def test_a_retention_policy_and_lost_answers(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """An object is written at most once, also if the response is lost."""
    original, stored, lost = storage.write_bytes, set(), []

    def policy(uri: str, *args: object) -> None:
        if uri in stored:
            raise StorageError("Forbidden: subject to the bucket's retention policy")
        if refused == "the bucket is away" and len(lost) < 2:
            lost.append(uri)
            raise StorageOutage("503")
        original(uri, *args)  # type: ignore[arg-type]
        stored.add(uri)
        if len(stored) % 2 == 1:
            raise StorageOutage("the answer is lost")

    monkeypatch.setattr(storage, "write_bytes", policy)
    logger = BucketTensorBoardLogger(bucket)
    for step in range(9):
        logger.log_metrics({"a": 1.0}, step)
        try:
            logger.publish()
        except StorageOutage:
            assert refused == "the bucket is away"
    logger.finalize("success")
    assert [step for step, _ in scalars(copy(bucket, tmp_path / "copy"))] == list(range(9))


def test_a_day_has_less_than_a_thousand_objects(bucket: str) -> None:
    """Also after a restart, which does not begin with short intervals again."""
    logger = BucketTensorBoardLogger(bucket)
    elapsed, per_hour, per_day = 0.0, 0, 0
    while elapsed < 86400:
        elapsed += logger._interval()
        logger._objects += 1
        per_hour += elapsed <= 3600
        per_day += 1
    assert (per_hour, per_day) == (146, 973)
    assert logger._interval() == 120
    assert BucketTensorBoardLogger(bucket)._interval() == 10


def test_a_restart_counts_the_objects_that_are_there(bucket: str) -> None:
    storage.write_many(bucket, {f"{events.PREFIX}{n:010d}.host": b"" for n in range(200)})
    logger = BucketTensorBoardLogger(bucket)
    logger.log_metrics({"a": 1.0}, 0)
    logger.publish()
    assert logger._interval() == pytest.approx(10 * (1 + 201 / 50))
    logger.finalize("success")


def test_many_events_are_published_before_their_time(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.monitoring.tensorboard.logger.ROTATE_BYTES", 2000)
    logger = BucketTensorBoardLogger(bucket, publish_seconds=600)
    logger.log_metrics({"a": 1.0}, 0)
    logger._publish_when_due()
    assert not storage.exists(bucket)
    for step in range(100):
        logger.log_metrics({"a": 1.0}, step)
    logger._publish_when_due()
    assert len(names(bucket)) == 1
    logger.finalize("success")


def test_events_of_sub_folders_are_published_at_the_end(bucket: str) -> None:
    logger = BucketTensorBoardLogger(bucket)
    logger.experiment.add_scalars("both", {"x": 1.0, "y": 2.0}, 0)
    logger.finalize("success")
    assert {name.partition("/")[0] for name in names(bucket) if "/" in name} == {"both_x", "both_y"}


def test_nothing_is_published_without_the_lease(bucket: str, tmp_path: Path) -> None:
    logger = BucketTensorBoardLogger(bucket, before_write=lambda: (_ for _ in ()).throw(LeaseError("lost")))
    logger.log_metrics({"a": 1.0}, 0)
    with pytest.raises(LeaseError):
        logger.publish()
    logger._publish_when_due()
    logger.finalize("failed")
    assert not storage.exists(bucket)
    assert not list(tmp_path.glob("job-*"))


def test_a_bucket_that_hangs_does_not_block_the_end(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    answers: list[bool] = []
    monkeypatch.setattr("job.monitoring.tensorboard.logger.CLOSE_SECONDS", -9.5)
    monkeypatch.setattr(storage, "write_bytes", lambda *_: answers.append(answered.wait(300)))
    logger = BucketTensorBoardLogger(bucket)
    logger.log_metrics({"a": 1.0}, 0)
    with pytest.raises(StorageOutage, match=r"are kept in .*job-tensorboard"):
        logger.finalize("success")
    assert not answers
    temporary.remove_all()
    assert logger._files is not None
    assert logger._files.complete()
    answered.set()


def test_names_and_numbers() -> None:
    name = f"{events.PREFIX}0000000012.host.name.7"
    assert number_of(name) == 12
    assert renumbered(name, 13) == f"{events.PREFIX}0000000013.host.name.7"
    for other in ("x", events.PREFIX, f"{events.PREFIX}x.y", f"{events.PREFIX}²", f"{events.PREFIX}{'9' * 5000}.x"):
        assert number_of(other) == 0


def test_events_go_on_when_a_program_has_cleaned_up_the_folder(bucket: str, tmp_path: Path) -> None:
    logger = BucketTensorBoardLogger(bucket)
    logger.log_metrics({"a": 1.0}, 0)
    logger.publish()
    assert logger._files is not None
    shutil.rmtree(logger._files.folder)
    logger.log_metrics({"a": 1.0}, 1)
    logger.finalize("success")
    assert scalars(copy(bucket, tmp_path / "copy")) == [(0, 1.0), (1, 1.0)]
