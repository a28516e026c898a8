"""A bucket without permission to delete or replace objects: a retention policy, or a create-only account."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import msgspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_checkpoint import save, state

from job import checkpoint, storage
from job.checkpoint.retention import Retention
from job.checkpoint.settings import CheckpointSettings
from job.monitoring import accounting
from job.monitoring.accounting import Attempt
from job.storage.json_files import write_json


class LockedFileSystem(MemoryFileSystem):
    """A memory filesystem whose objects cannot be deleted or replaced."""

    protocol = "locked"
    store: dict[str, Any] = {}  # noqa: RUF012  (fsspec's own, per class)
    pseudo_dirs: list[str] = [""]  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._require_new(path)
        super().pipe_file(path, value, mode=mode, **kwargs)

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._require_new(rpath)
        super().put_file(lpath, rpath, *args, **kwargs)

    def rm_file(self, path: str) -> None:
        if self.exists(path):
            raise PermissionError("retentionPolicyNotMet")

    def _require_new(self, path: str) -> None:
        if self.exists(path):
            raise PermissionError("retentionPolicyNotMet")


@pytest.fixture
def run_dir() -> str:
    fsspec.register_implementation("locked", LockedFileSystem, clobber=True)
    LockedFileSystem.store.clear()
    return "locked://bucket/run"


def test_refused_deletions_are_logged_once(run_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    retention = Retention(CheckpointSettings(keep_last=1, keep_best=0), run_dir)
    for step in (10, 20, 30):
        save(run_dir, state(step))
        retention.remove_superseded()
    assert [m.global_step for m in checkpoint.manifests(run_dir)] == [10, 20, 30]
    assert caplog.text.count("could not be deleted and occupy space") == 1


def test_leftovers_of_a_killed_attempt_do_not_block_the_next(run_dir: str) -> None:
    storage.write_bytes(f"{run_dir}/checkpoints/epoch=000-step=00000010.ckpt", b"half")
    save(run_dir, state(10))
    (manifest,) = checkpoint.manifests(run_dir)
    assert manifest.file == "epoch=000-step=00000010-2.ckpt"
    assert checkpoint.newest_verified(run_dir) == manifest


def test_a_report_that_cannot_be_replaced_is_kept(run_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    write_json(f"{run_dir}/report.json", {"a": float("nan")})
    write_json(f"{run_dir}/report.json", {"a": 2})
    assert json.loads(storage.read_bytes(f"{run_dir}/report.json")) == {"a": None}
    assert "holds the values of an earlier attempt" in caplog.text


AT_NO_DATE = b'[{"began": -1e11, "ended": 1e11, "world_size": 1}]'


def records(path: Path, *starts: dict[str, Any]) -> str:
    (path / accounting.FILE).write_text(json.dumps(starts))
    return str(path)


def test_no_figure_of_the_accounting_is_negative() -> None:
    first = Attempt(began=0, ended=100, world_size=1, startup=10, features=60, step=20)
    overlapping = Attempt(began=5, ended=90, world_size=1, startup=80, step=30, recomputed=40)
    for starts in ([first], [first, overlapping], [overlapping], [Attempt(began=9, ended=9, world_size=1)]):
        totals = accounting.totals(starts)
        assert min(totals.values()) >= 0
        assert sum(v for k, v in totals.items() if k not in ("goodput", "wall")) == pytest.approx(totals["wall"])
        assert totals["goodput"] <= 1
    assert accounting.totals([first])["goodput"] == pytest.approx(0.8)  # features are no waste


def test_recomputed_time_is_recorded(tmp_path: Path) -> None:
    run_dir = records(tmp_path, {"began": 1, "ended": 9, "world_size": 1, "step": 5, "lost": 2})
    (attempt,) = accounting.read(run_dir)
    assert attempt.recomputed == 2
    assert msgspec.json.decode(msgspec.json.encode(attempt))["lost"] == 2
    assert accounting.totals([attempt])["recomputed"] == 2


@pytest.mark.parametrize(
    "content",
    [b"[{", b"{}", b'[{"began": "x"}]', b"[" * 10**5, b'[{"began": 1e999}]', b"\xff", AT_NO_DATE],
)
def test_a_damaged_accounting_file_is_set_aside(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / accounting.FILE).write_bytes(content)
    assert accounting.read(str(tmp_path)) == []
    keeper = accounting.Accounting(SimpleNamespace(stall_seconds=0.0), None)  # type: ignore[arg-type]
    keeper._run_dir = str(tmp_path)
    assert keeper._read_earlier() == []
    keeper.write()
    (kept,) = tmp_path.glob("accounting.damaged-*.json")
    assert kept.read_bytes() == content
    assert len(accounting.read(str(tmp_path))) == 1
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("newer", [{"format": 3}, {"format": 3, "new": 1}])
def test_a_newer_accounting_file_is_kept(
    newer: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = records(tmp_path, {"began": 1, "ended": 2, "world_size": 1, **newer})
    before = (tmp_path / accounting.FILE).read_bytes()
    keeper = accounting.Accounting(SimpleNamespace(stall_seconds=0.0), None)  # type: ignore[arg-type]
    keeper._run_dir = run_dir
    assert keeper._read_earlier() == []
    keeper.write()
    assert (tmp_path / accounting.FILE).read_bytes() == before
    assert "written by a newer version of job" in caplog.text
