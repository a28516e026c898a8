"""Each check of ``python -m job check``: a broken instance of what it checks, and a healthy run."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import json
import shutil
import socket
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import msgspec
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem
from support import TINY, Outcome, fit_here, free_port, options, picture_files, run_here, write_files
from test_locked_bucket import LockedFileSystem

from job import storage
from job.check import access, bucket, cluster, data, machine, network, run_dir_state, training
from job.check.estimate import Plan, estimate, loader
from job.check.finding import CheckReport, Finding, ok
from job.check.preflight import preflight
from job.check.runner import Check, run_check, run_checks
from job.check.training import Measured
from job.checkpoint.settings import CheckpointSettings
from job.data.datamodule import ImageDataModule
from job.errors import JobError, StorageError
from job.features.callback import FeatureSettings
from job.model.config import ModelConfig
from job.model.freeze import Stage
from job.process.identity import ProcessId, process_age
from job.resilience import attempts
from job.resilience.lease import FILE as LEASE_FILE
from job.resilience.lease import Lease
from job.resilience.lease_file import FORMAT, Holder
from job.train.fit import FitSettings

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(autouse=True)
def unfinished_checks() -> Iterator[None]:
    """Wait for checks that a test left running: the next one's command would end this process, as its own."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("check-"):
            thread.join(240)


def checked(**changes: object) -> tuple[Outcome, CheckReport]:
    with pytest.MonkeyPatch.context() as patch:  # no limit ends what takes long on a loaded machine
        patch.setattr("job.check.preflight.Check", lambda *args: replace(Check(*args), seconds=240.0))
        patch.setattr("job.check.preflight.SCAN_SECONDS", 240.0)
        outcome = run_here("check", *options(TINY, **changes), "--json")
    start = outcome.output.index("{\n")
    document, _ = json.JSONDecoder().raw_decode(outcome.output[start:])
    return outcome, msgspec.convert(document, CheckReport, strict=True)


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


def scanned(root: Path, tmp_path: Path, **changes: Any) -> tuple[ImageDataModule, list[Finding]]:
    images = ImageDataModule(root=str(root), image_size=32, cache_dir=str(tmp_path / "cache"), **changes)
    return images, list(data.scan(images, str(tmp_path / "run"), tmp_path / "index", 240))


def test_a_healthy_run_is_all_ok_and_changes_nothing(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []

    def measure_within(*args: Any) -> Any:
        seconds.append(args[-1])
        return training.measure(*args)

    monkeypatch.setattr("job.check.preflight.training", SimpleNamespace(measure=measure_within))
    outcome, report = checked(data__root=colours, run_dir=tmp_path / "runs" / "1", price_per_hour=3.6)
    assert outcome.returncode == 0, outcome.output
    assert {finding.check for finding in report.findings if finding.status != "ok"} == set(), outcome.output
    assert set(statuses(report.findings)) >= {
        *("data_access", "data_scan", "data_classes", "data_samples", "data_overlap", "lease", "earlier_run", "clock"),
        *("run_dir_access", "weights", "nodes", "shared_memory", "cache_disk", "temporary_disk", "open_files"),
        *("device", "memory", "loader", "estimate"),
    }
    assert not (tmp_path / "runs").exists()
    assert report.estimate is not None
    assert (report.estimate.epochs, report.estimate.steps) == (3, 12)
    assert report.estimate.price == pytest.approx(report.estimate.seconds / 1000, abs=0.01)
    assert report.estimate.checkpoint_bytes > 1_000_000
    (measuring,) = seconds
    assert measuring <= 12, "the whole check takes less than a minute"


def test_a_healthy_run_in_a_bucket_leaves_nothing_there(gcs_colours: str, tmp_path: Path) -> None:
    before = [entry.key for entry in storage.list_files(gcs_colours.rpartition("/")[0])]
    run_dir = f"{gcs_colours.rpartition('/')[0]}/preflight/1"
    outcome, report = checked(data__root=gcs_colours, run_dir=run_dir, data__cache_dir=tmp_path)
    assert outcome.returncode == 0, outcome.output
    # The machine of the tests may be anywhere.
    assert {each.check for each in report.findings if each.status != "ok"} <= {"region", "cache_disk"}, outcome.output
    assert [entry.key for entry in storage.list_files(gcs_colours.rpartition("/")[0])] == before
    assert not list((tmp_path / "samples").rglob("*.jpg"))


def test_a_missing_bucket_is_named(gcs: str, colours: Path) -> None:
    outcome, report = checked(data__root=colours, run_dir="gs://no-such-bucket/run")
    assert outcome.returncode == 2
    assert {each.check for each in report.findings if each.status == "fail"} >= {"run_dir_access"}
    assert statuses(report.findings)["weights"] == "ok"
    assert all(each.mend for each in report.findings if each.status != "ok")


def test_the_table_names_each_finding_and_what_to_do(tmp_path: Path) -> None:
    result = run_here("check", *options(TINY, data__root=tmp_path / "nothing", run_dir=tmp_path / "run"))
    assert result.returncode == 2
    assert "no such bucket, object or folder" in result.output
    assert "fail data_access: Correct --data.root" in result.output
    assert "check(s) failed: data_access, data_scan" in result.output


def test_the_options_of_fit_and_their_errors(colours: Path, tmp_path: Path) -> None:
    common = ["check", "--data.root", str(colours), "--run_dir", str(tmp_path / "run")]
    assert "Did you mean" in run_here(*common, "--model.backbon", "resnet18").output
    assert run_here(*common, "--price-per-hour", "-1").returncode == 2
    assert run_here(*common, "--epochs", "0").returncode == 2
    help = run_here("check", "--help").output
    assert "--price_per_hour PRICE" in help and "--json" in help and "--checkpoint.keep_last" in help


# Rights to run_dir


def rights(run_dir: object) -> list[Finding]:
    return list(access.run_dir_access(str(run_dir)))


@pytest.mark.parametrize("run_dir", ["/proc/no/run", "{file}/run"])
def test_a_run_dir_that_cannot_be_written(run_dir: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        rights(run_dir.format(file=tmp_path / "file"))


def test_a_file_beside_the_probe_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: 1")
    assert statuses(rights(tmp_path / "run")) == {"clock": "ok", "run_dir_access": "ok"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("store", ["gcs", "s3"])
def test_rights_in_a_bucket(store: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(store)
    run_dir = f"{root}/preflight/rights"
    assert statuses(rights(run_dir)) == {"clock": "ok", "run_dir_access": "ok"}
    assert not storage.exists(run_dir)
    with pytest.raises(StorageError, match="no such bucket"):
        rights(f"{root.partition('://')[0]}://no-such-bucket/run")


def test_objects_that_cannot_be_replaced_or_deleted() -> None:
    fsspec.register_implementation("locked", LockedFileSystem, clobber=True)
    LockedFileSystem.store.clear()
    findings = [each for each in rights("locked://bucket/run") if each.check == "run_dir_access"]
    assert [finding.status for finding in findings] == ["warn", "warn"]
    assert "cannot be overwritten" in findings[0].message
    assert "cannot be deleted" in findings[1].message


def test_a_store_that_ignores_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.storage.stores.local.LocalDisk._version", lambda self, path: None)
    (finding,) = (each for each in rights(tmp_path) if each.check == "run_dir_access")
    assert finding.status == "warn"
    assert "that a condition forbids" in finding.message


class SkewedFileSystem(MemoryFileSystem):
    """A store whose clock is wrong."""

    protocol = "skewed"
    store: dict[str, Any] = {}  # noqa: RUF012  (fsspec's own, per class)
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    seconds: float | None = 0.0

    def modified(self, path: str) -> datetime:
        if self.seconds is None:
            raise NotImplementedError
        return datetime.now(UTC) + timedelta(seconds=self.seconds)


@pytest.mark.parametrize(
    ("seconds", "status", "words"),
    [
        (1.0, "ok", "agree"),
        (-60.0, "warn", "59 s ahead of"),
        (60.0, "warn", "59 s behind"),
        (3600.0, "fail", "Stores refuse"),
        (None, "warn", "does not say"),
    ],
)
def test_the_clock(seconds: float | None, status: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("skewed", SkewedFileSystem, clobber=True)
    monkeypatch.setattr(SkewedFileSystem, "seconds", seconds)
    (finding,) = (each for each in rights("skewed://bucket/run") if each.check == "clock")
    assert finding.status == status
    assert words in finding.message


def test_a_store_without_conditional_writes() -> None:
    fsspec.register_implementation("skewed", SkewedFileSystem, clobber=True)
    (finding,) = (each for each in rights("skewed://bucket/run") if each.check == "run_dir_access")
    assert finding.status == "warn"
    assert "conditional writes are not supported" in finding.message
    assert not SkewedFileSystem.store


# Bucket


def test_settings_of_a_google_bucket(gcs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = f"{gcs}/run"
    assert statuses(list(bucket.bucket_settings(run_dir))) == {"bucket_settings": "ok"}
    answer = {
        "location": "EUROPE-WEST4",
        "retentionPolicy": {"retentionPeriod": "86400"},
        "softDeletePolicy": {"retentionDurationSeconds": "604800"},
        "versioning": {"enabled": True},
        "storageClass": "COLDLINE",
    }
    monkeypatch.setattr("job.storage.stores.google.gcs_call", lambda *args, **kwargs: answer)
    findings = list(bucket.bucket_settings(run_dir))
    assert [finding.status for finding in findings] == ["warn"] * 4
    for finding, word in zip(findings, ["86,400 s", "noncurrent", "7 days", "COLDLINE"], strict=True):
        assert word in finding.message
        assert finding.mend

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Forbidden: storage.buckets.get")

    monkeypatch.setattr("job.storage.stores.google.gcs_call", refuse)
    (finding,) = bucket.bucket_settings(run_dir)
    assert finding.status == "warn"
    assert "cannot be found out" in finding.message


def test_settings_of_an_s3_bucket(s3: str) -> None:
    assert statuses(list(bucket.bucket_settings(f"{s3}/run"))) == {"bucket_settings": "ok"}
    fs, _ = storage.filesystem(s3)
    fs.call_s3("create_bucket", Bucket="locked", ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 3}}
    lock = {"ObjectLockEnabled": "Enabled", "Rule": rule}
    fs.call_s3("put_object_lock_configuration", Bucket="locked", ObjectLockConfiguration=lock)
    messages = [finding.message for finding in bucket.bucket_settings("s3://locked/run")]
    assert any("compliance, 3 days" in message for message in messages)
    assert any("noncurrent" in message for message in messages)


def test_other_stores_tell_no_settings() -> None:
    (finding,) = bucket.bucket_settings("memory://bucket/run")
    assert finding.status == "warn"
    assert list(bucket.bucket_settings("/a/folder")) == []


@contextlib.contextmanager
def metadata_server(zone: str, flavor: str = "Google") -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Metadata-Flavor", flavor)
            self.end_headers()
            self.wfile.write(zone.encode())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("zone", "status", "words"),
    [
        ("projects/1/zones/us-central1-a", "ok", "are in us-central1"),
        ("projects/1/zones/europe-west4-b", "warn", "is in us-central1, this machine in europe-west4"),
        ("<html>a proxy</html>", "warn", "region of this machine cannot be found out"),
    ],
)
def test_the_region(zone: str, status: str, words: str, gcs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_METADATA_SECONDS", 240.0)
    with metadata_server(zone) as host:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        (finding,) = bucket.regions([f"{gcs}/data", f"{gcs}/run", "/local/run"])
    assert finding.status == status, finding
    assert words in finding.message


def test_no_metadata_server_costs_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts, connect = [], http.client.HTTPConnection

    def connect_within(host: str, timeout: float) -> http.client.HTTPConnection:
        timeouts.append(timeout)
        return connect(host, timeout=timeout)

    monkeypatch.setattr(http.client, "HTTPConnection", connect_within)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        assert bucket.machine_region() is None
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{free_port()}")
    assert bucket.machine_region() is None
    assert timeouts == [1.0, 1.0]


# run_dir


def test_a_lease_that_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.resilience.lease.RENEWALS", 1600)  # twice per second, and waited for in minutes
    assert statuses(list(run_dir_state.lease(str(tmp_path)))) == {"lease": "ok"}
    holder = Lease(str(tmp_path), seconds=800.0)
    with holder.released_at_end():
        holder.acquire()
        (finding,) = run_dir_state.lease(str(tmp_path))
        holder.require_held()
    assert finding.status == "fail"
    assert "another run writes to" in finding.message


def test_a_lease_of_a_dead_process_on_another_machine(tmp_path: Path) -> None:
    holder = Holder("a", ProcessId("elsewhere", 7, "boot", "namespace", "1"), 1.0, 3, FORMAT)
    content = msgspec.json.encode(holder)
    (tmp_path / LEASE_FILE).write_bytes(content)
    (finding,) = run_dir_state.lease(str(tmp_path))
    assert finding.status == "warn"
    assert "process 7 on elsewhere" in finding.message
    assert (tmp_path / LEASE_FILE).read_bytes() == content


def test_an_earlier_run(tmp_path: Path) -> None:
    run_dir = fit_here(tmp_path, trainer__max_epochs=1)
    before = {path: path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}
    config = (run_dir / "config.yaml").read_text()

    def found(text: str, **settings: Any) -> tuple[str, str]:
        (finding,) = run_dir_state.earlier_run(FitSettings(str(run_dir), {}, text, **settings))
        return finding.status, finding.message

    assert found(config)[0] == "ok"
    assert "continues after step 2" in found(config)[1]
    status, message = found(config.replace("max_epochs: 1", "max_epochs: 5"))
    assert status == "warn" and "trainer.max_epochs: 1 → 5" in message
    status, message = found(config.replace("backbone: timm/test_resnet", "backbone: resnet18"))
    assert status == "fail" and "model.backbone: timm/test_resnet → resnet18" in message
    assert found(config, resume="never")[0] == "fail"
    outcome, report = checked(data__root=tmp_path / "colours", run_dir=run_dir, trainer__max_epochs=1)
    assert outcome.returncode == 0, outcome.output
    assert statuses(report.findings)["earlier_run"] == "ok", outcome.output
    assert before == {path: path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}


def test_other_images_than_those_of_the_run(tmp_path: Path) -> None:
    run_dir = fit_here(tmp_path, trainer__max_epochs=1)
    changes: dict[str, object] = {"data__root": tmp_path / "colours", "run_dir": run_dir, "trainer__max_epochs": 1}
    (tmp_path / "colours" / "red" / "003.jpg").unlink()
    outcome, report = checked(**changes)
    assert outcome.returncode == 2
    (finding,) = (each for each in report.findings if each.status == "fail")
    assert finding.check == "earlier_run"
    assert "the training images have changed" in finding.message
    assert run_here("fit", *options(TINY, **changes)).returncode == 2


def test_too_many_failed_attempts_and_a_damaged_configuration(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"{}").hexdigest()
    record = attempts.Attempts(attempts.FORMAT, -1, digest, failed=attempts.MAX_FAILED, last_error="no luck")
    (tmp_path / attempts.FILE).write_bytes(msgspec.json.encode(record))
    with pytest.raises(JobError, match="no luck"):
        list(run_dir_state.earlier_run(FitSettings(str(tmp_path), {}, "{}")))
    (tmp_path / "config.yaml").write_text("- not a mapping")
    findings = list(run_dir_state.earlier_run(FitSettings(str(tmp_path), {}, "{a: 1}")))
    assert [finding.status for finding in findings] == ["warn", "ok"]


def test_shared_features_are_written_too(colours: Path, tmp_path: Path) -> None:
    outcome, report = checked(data__root=colours, run_dir=tmp_path / "run", features__uri="/proc/features")
    assert outcome.returncode == 2
    assert statuses(report.findings)["features_access"] == "fail"


def test_fewer_epochs_than_trained(tmp_path: Path) -> None:
    run_dir = str(fit_here(tmp_path, trainer__max_epochs=2))
    settings = FitSettings(run_dir, {"max_epochs": 1}, "{}")
    (finding,) = run_check(Check("earlier_run", lambda: run_dir_state.earlier_run(settings), 240, "x"))
    assert finding.status == "fail"
    assert "has trained 2 epochs, and --trainer.max_epochs is 1" in finding.message


@pytest.mark.parametrize("resume", ["must", "best"])
def test_no_checkpoint_where_one_must_be(resume: Any, tmp_path: Path) -> None:
    (finding,) = run_dir_state.earlier_run(FitSettings(str(tmp_path), {}, "{}", resume=resume))
    assert finding.status == "fail"


def test_weights_of_another_run(tmp_path: Path) -> None:
    run_dir = fit_here(tmp_path, trainer__max_epochs=1)
    config, images = ModelConfig(backbone="timm/test_resnet"), ImageDataModule(root=str(tmp_path), image_size=32)
    other = FitSettings(str(tmp_path / "second"), {}, "{}", init_from=str(run_dir))
    (finding,) = network.weights(config, images, other)
    assert f"with {run_dir}, of 2 classes" in finding.message
    with pytest.raises(JobError, match="has the backbone timm/test_resnet"):
        list(network.weights(ModelConfig(backbone="resnet18"), images, other))
    with pytest.raises(JobError, match="--init_from"):
        list(network.weights(config, images, FitSettings(str(tmp_path / "second"), {}, "{}", init_from=str(tmp_path))))
    (finding,) = network.weights(config, images, FitSettings(str(run_dir), {}, "{}"))
    assert "the run's own checkpoint" in finding.message


# Data


def test_unreadable_images(colours: Path, tmp_path: Path) -> None:
    for path in sorted((colours / "red").iterdir())[:10]:
        path.write_bytes(b"no image")
    images, _ = scanned(colours, tmp_path)
    (finding,) = data.samples(images)
    assert finding.status == "fail"
    assert "red/00" in finding.message
    images.bad_samples.limit = type(images.bad_samples.limit)(count=100)
    (finding,) = data.samples(images)
    assert finding.status == "warn"


def test_an_overlapping_validation_part(tmp_path: Path) -> None:
    root = write_files(tmp_path / "data" / "train", picture_files(["blue", "red"], 20)).parent
    write_files(root / "val", picture_files(["blue", "red"], 5, seed=99))
    images, _ = scanned(root, tmp_path)
    assert statuses(list(data.overlap(images))) == {"data_overlap": "ok"}
    shutil.copy(root / "train" / "red" / "003.jpg", root / "val" / "red" / "copy.jpg")
    images, _ = scanned(root, tmp_path / "second")
    (finding,) = data.overlap(images)
    assert finding.status == "warn"
    assert "copy.jpg" in finding.message and "003.jpg" in finding.message


def test_classes(tmp_path: Path) -> None:
    root = write_files(tmp_path / "train", picture_files(["blue"], 60) | picture_files(["red"], 3)).parent
    write_files(tmp_path / "val", picture_files(["blue"], 2))
    images, _ = scanned(root, tmp_path)
    messages = [finding.message for finding in data.classes(images, ModelConfig())]
    assert "fewer than 5 training images" in messages[0]
    assert "the largest class, blue, has 60" in messages[1]
    assert "1 classes have no image in val, for example red" in messages[2]
    balanced = list(data.classes(images, ModelConfig(class_weights="balanced")))
    assert len(balanced) == 2


def test_files_that_are_left_out(colours: Path, tmp_path: Path) -> None:
    (colours / "red" / "photo.psd").write_bytes(b"1")
    _, (finding,) = scanned(colours, tmp_path)
    assert finding.status == "warn"
    assert "photo.psd" in finding.message


def test_a_listing_that_takes_too_long(tmp_path: Path) -> None:
    import generated  # noqa: F401  (registers its protocol)

    images = ImageDataModule(root="generated://400x2000", image_size=32, cache_dir=str(tmp_path / "cache"))
    (finding,) = data.scan(images, str(tmp_path / "run"), tmp_path / "index", 0.5)
    assert finding.status == "warn"
    assert "the listing was ended after" in finding.message
    assert "python -m job index" in finding.mend


# Network, machine, cluster


def test_weights_of_another_architecture(colours: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "wrong.safetensors")
    config = ModelConfig(backbone="timm/test_resnet", weights=str(tmp_path / "wrong.safetensors"))
    images, settings = ImageDataModule(root=str(colours), image_size=32), FitSettings(str(tmp_path / "run"), {}, "{}")
    (finding,) = run_check(Check("weights", lambda: network.weights(config, images, settings), 240, "Correct it."))
    assert finding.status == "fail"
    assert "do not fit the backbone" in finding.message


def usage(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(1 << 40, 0, free))


def test_small_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms import v2

    augmented = ImageDataModule(root="s3://bucket/data", augment=v2.Resize(224), num_workers=8, cache_dir=str(tmp_path))
    usage(monkeypatch, 64 << 20)
    (shm,) = machine.shared_memory(augmented)
    assert shm.status == "fail" and "/dev/shm has 67.1 MB free, and about 154 MB" in shm.message
    few = ImageDataModule(root="s3://bucket/data", num_workers=4)
    assert statuses(list(machine.shared_memory(few))) == {"shared_memory": "ok"}
    many = ImageDataModule(root="s3://bucket/data", num_workers=16, global_batch_size=64)
    assert statuses(list(machine.shared_memory(many))) == {"shared_memory": "warn"}
    (cache,) = machine.cache_disk(augmented, augmented.cache_dir, FeatureSettings())
    assert cache.status == "warn" and "of 20 GB" in cache.message
    assert machine.temporary_disk(100 << 20).status == "fail"
    assert machine.temporary_disk(1 << 20).status == "warn"
    usage(monkeypatch, 1 << 36)
    assert machine.temporary_disk(1 << 20).status == "ok"


def test_a_cache_that_cannot_be_used(colours: Path, tmp_path: Path) -> None:
    """Also where the listing, at the same time, has chosen another one."""
    outcome, report = checked(data__root=colours, run_dir=tmp_path / "run", data__cache_dir="/proc/cache")
    assert outcome.returncode == 0, outcome.output
    (finding,) = (each for each in report.findings if each.check == "cache_disk")
    assert finding.status == "warn"
    assert "/proc/cache cannot be the cache" in finding.message


@pytest.mark.parametrize(("limit", "status"), [(256, "fail"), (1000, "warn"), (2048, "ok"), (1 << 20, "ok")])
def test_open_files(limit: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (limit, limit))
    (finding,) = machine.open_files()
    assert finding.status == status


def indexed_job(host: str) -> dict[str, str]:
    return {"JOB_COMPLETION_INDEX": "1", "LAUNCH_NODES": "2", "LAUNCH_COORDINATOR": host}


def test_node_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "DNS_SECONDS", 0.1)
    (finding,) = cluster.nodes(indexed_job("train-0.nowhere.invalid"))
    assert finding.status == "fail" and "has no DNS record" in finding.message
    (finding,) = cluster.nodes(indexed_job(f"127.0.0.1:{free_port()}"))
    assert finding.status == "ok" and "launch opens port" in finding.message
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        (finding,) = cluster.nodes(indexed_job(f"127.0.0.1:{server.getsockname()[1]}"))
    assert finding.status == "ok"

    def dropped(*args: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", dropped)
    (finding,) = cluster.nodes(indexed_job("127.0.0.1:1"))
    assert finding.status == "fail" and "NetworkPolicy" in finding.mend
    with pytest.raises(JobError, match="LAUNCH_COORDINATOR"):
        list(cluster.nodes({"JOB_COMPLETION_INDEX": "1", "LAUNCH_NODES": "2"}))


# Memory, speed, estimate


def test_too_little_memory_for_a_step(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.check.training.free_bytes", lambda device: -1e9)
    outcome, report = checked(data__root=colours, run_dir=tmp_path / "run")
    assert outcome.returncode == 2
    (finding,) = (each for each in report.findings if each.check == "memory")
    assert finding.status == "fail"
    assert "--data.global_batch_size" in finding.mend


@pytest.mark.parametrize(
    "refused",
    [
        {"model__optimizer": "SGD", "model__optimizer__momentum": -1},
        pytest.param(
            {"trainer__accelerator": "gpu"},
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_an_option_that_training_would_refuse(refused: dict[str, object], colours: Path, tmp_path: Path) -> None:
    _, report = checked(data__root=colours, run_dir=tmp_path / "run", **refused)
    (finding,) = (each for each in report.findings if each.status == "fail")
    assert finding.check == "training_step"
    assert statuses(report.findings)["data_overlap"] == "ok"


def plan(colours: Path, tmp_path: Path, measured: Measured, **changes: Any) -> Plan:
    images, _ = scanned(colours, tmp_path, **changes)
    return Plan(ModelConfig(milestones=[]), images, FeatureSettings(), CheckpointSettings(), measured)


def test_a_gpu_that_waits_for_images(colours: Path, tmp_path: Path) -> None:
    measured = Measured(
        device="a GPU",
        is_cpu=False,
        batch=8,
        seconds_per_image={Stage.ALL: 0.6},
        loader_rate=1.0,
        batches=4,
        steps=400,
        epochs=100,
        checkpoint_bytes=10,
    )
    slow = plan(colours, tmp_path, measured, num_workers=1)
    finding = loader(slow, is_far=True)
    assert finding.status == "warn"
    assert "the GPU will wait 40% of its time" in finding.message
    assert finding.mend.startswith("Move the data to the region of this machine")
    result = estimate(slow, 36.0)
    assert result is not None
    assert result.seconds == pytest.approx(100 * (32 + 8))
    assert result.price == pytest.approx(40.0)
    assert result.kept_bytes == 30
    measured.loader_rate = 2.0
    assert loader(slow, is_far=False).status == "ok"
    measured.epochs = measured.steps = None
    assert estimate(slow, 36.0) is None


def test_cached_features_spare_the_loader(colours: Path, tmp_path: Path) -> None:
    measured = Measured(batch=8, seconds_per_image={Stage.HEAD: 0.1}, loader_rate=1.0, batches=4, steps=400, epochs=100)
    frozen = plan(colours, tmp_path, measured)
    frozen = Plan(ModelConfig(milestones=[1000]), frozen.data, frozen.features, frozen.checkpoint, measured)
    cached, uncached = (
        Plan(frozen.config, frozen.data, FeatureSettings(use=use), frozen.checkpoint, measured).seconds()
        for use in ("auto", "never")
    )
    assert cached is not None and uncached is not None
    assert cached < uncached / 20


# Time limits


def test_the_age_of_this_process() -> None:
    first = process_age()
    time.sleep(0.05)
    assert 0 < first < process_age() < time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_check_that_hangs_or_fails_does_not_stop_the_others() -> None:
    done, ended = threading.Event(), list[bool]()

    def hang() -> list[Finding]:
        ended.append(done.wait(240))
        return [ok("hangs", "no longer")]

    def crash() -> list[Finding]:
        raise ZeroDivisionError("a bug")

    checks = [
        Check("hangs", hang, 0.2, "wait"),
        Check("silent", hang, 0.2, "wait", "fail"),
        Check("crashes", crash, 240, "report it"),
        Check("works", lambda: [ok("works", "yes")], 240, ""),
    ]
    findings = run_checks(checks)
    assert not ended
    done.set()
    assert statuses(findings) == {"hangs": "warn", "silent": "fail", "crashes": "fail", "works": "ok"}
    assert findings[0].message.startswith("not finished after")


def test_a_step_that_takes_too_long_does_not_fail_the_check(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr("job.check.training.run_step", lambda *args: released.wait(240))
    monkeypatch.setattr("job.check.preflight.TOTAL_SECONDS", 0.0)
    monkeypatch.setattr("job.check.preflight.LEAST_TRAINING_SECONDS", 1.0)
    images = ImageDataModule(root=str(colours), image_size=32, cache_dir=str(tmp_path / "cache"))
    config = ModelConfig(backbone="timm/test_resnet", weights="none")
    settings = FitSettings(str(tmp_path / "run"), {"accelerator": "cpu", "max_epochs": 1, "precision": "32-true"}, "{}")
    report = preflight(config, images, settings)
    released.set()
    assert report.status == "warn"
    assert "not finished after 1 s" in {each.check: each.message for each in report.findings}["training_step"]
    assert report.estimate is None


def test_no_secret_and_no_markup_in_a_finding(tmp_path: Path) -> None:
    root = "https://user:hunter2@127.0.0.1:1/data.zip?X-Goog-Signature=abcdef"
    outcome, _ = checked(data__root=root, run_dir=tmp_path / "run")
    assert outcome.returncode == 2
    assert "hunter2" not in outcome.output and "abcdef" not in outcome.output
