"""Systems without CPU affinity (macOS), fcntl (Windows) or /proc."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from job.process import temporary
from job.process.cpus import available_cpus
from job.process.file_lock import has_locks, lock_exclusively
from job.storage.local_cache import locked


def test_without_cpu_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cpus(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus(tmp_path) == 1


def test_without_fcntl_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert not has_locks()
    with locked(tmp_path / "x"), locked(tmp_path / "x"):
        pass
    folder = temporary.folder("test")
    temporary.delete_stale()  # its owner may be alive
    assert folder.exists()
    temporary.remove(folder)


def test_a_lock_excludes_another_descriptor(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w") as first, (tmp_path / "x").open("w") as second:
        lock_exclusively(first.fileno())
        with pytest.raises(BlockingIOError):
            lock_exclusively(second.fileno(), wait=False)
