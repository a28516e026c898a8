"""CPUs that a process may use: affinity, and the CPU limit of its container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import index_of

from job.data.datamodule import ImageDataModule
from job.monitoring.report.machine import hardware
from job.process import cpus
from job.process.cpus import available_cpus, cpu_limit


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "3200000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.max": "damaged\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_container_s_cpu_limit_counts(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is read from the kernel's files of cgroup v1 and v2."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == expected


def test_the_share_of_a_limit_is_of_all_of_it(tmp_path: Path) -> None:
    """The number of threads is a whole one, the limit need not be."""
    assert cpu_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert cpu_limit(tmp_path) == 3.5


def test_reports_and_threads_follow_the_limit(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cpus, "cpu_limit", lambda _: 3.5)
    assert hardware().cpus == 3
    assert ImageDataModule(root="images")._workers(index_of(colours)) == 3
