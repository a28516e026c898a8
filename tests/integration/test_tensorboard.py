"""No event is lost: buckets without append, outages, exceptions and kills."""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path

import pytest
from support import scalars

from job import storage
from job.errors import StorageOutage
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger

pytestmark = pytest.mark.integration


def test_every_event_of_many_steps_and_files_arrives(gcs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.monitoring.tensorboard.logger.ROTATE_BYTES", 50_000)
    logger = BucketTensorBoardLogger(f"{gcs}/many/tensorboard", publish_seconds=1)
    for step in range(3000):
        logger.log_metrics({"a": step / 7, "b": -step}, step)
        if step % 1000 == 0:
            time.sleep(1.5)
    logger.finalize("success")
    curves = scalars(f"{gcs}/many")
    assert [step for step, _ in curves["a"]] == list(range(3000))
    assert [value for _, value in curves["b"]] == [-step for step in range(3000)]
    assert len([e for e in storage.list_files(f"{gcs}/many/tensorboard") if e.size]) > 1


def test_events_are_published_while_the_run_goes_on(gcs: str) -> None:
    run_dir = f"{gcs}/live-{uuid.uuid4().hex}"  # also where the test is run once more
    logger = BucketTensorBoardLogger(f"{run_dir}/tensorboard", publish_seconds=1)
    logger.log_metrics({"a": 1.0}, 0)
    deadline = time.monotonic() + 120
    # The first object may have been written between the file's header and the value.
    while not storage.exists(f"{run_dir}/tensorboard") or "a" not in scalars(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert scalars(run_dir)["a"] == [(0, 1.0)]
    logger.finalize("success")


def test_an_outage_delays_events_and_loses_none(gcs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = BucketTensorBoardLogger(f"{gcs}/outage/tensorboard", publish_seconds=1)
    logger.log_metrics({"a": 0.0}, 0)
    with monkeypatch.context() as outage:
        outage.setattr(storage, "write_bytes", lambda *_: (_ for _ in ()).throw(StorageOutage("503")))
        for step in range(1, 300):
            logger.log_metrics({"a": float(step)}, step)
        time.sleep(2.5)
    logger.finalize("success")
    assert [step for step, _ in scalars(f"{gcs}/outage")["a"]] == list(range(300))


def test_a_permanent_outage_reports_where_the_events_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("job.monitoring.tensorboard.logger.CLOSE_SECONDS", 1.0)
    logger = BucketTensorBoardLogger("memory://away/tensorboard")
    monkeypatch.setattr(storage, "write_bytes", lambda *_: (_ for _ in ()).throw(StorageOutage("503")))
    logger.log_metrics({"a": 1.0}, 0)
    with pytest.raises(StorageOutage, match="are kept in") as excinfo:
        logger.finalize("success")
    kept = Path(str(excinfo.value).partition("kept in ")[2].partition(":")[0])
    assert list(kept.glob("events.out.tfevents.*"))


def test_a_resumed_run_continues_the_same_curve(gcs: str) -> None:
    uri = f"{gcs}/curve/tensorboard"
    for begin, end in ((0, 10), (6, 14)):  # killed at step 10; its checkpoint was of step 6
        logger = BucketTensorBoardLogger(uri, purge_step=begin)
        for step in range(begin, end):
            logger.log_metrics({"a": begin + step / 100}, step)
        logger.finalize("failed")
        time.sleep(1.1)  # event files are named by the second
    curve = scalars(f"{gcs}/curve")["a"]
    assert [step for step, _ in curve] == list(range(14))
    assert [round(value) for _, value in curve] == [0] * 6 + [6] * 8
