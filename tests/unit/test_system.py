"""``system/…``: what cgroups, the machine and NVML report, and what is logged of it."""

from __future__ import annotations

import builtins
import io
import os
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import fit_here, scalars

from job.monitoring import accounting, system
from job.monitoring.accounting import Attempt
from job.monitoring.system import CpuUsage, KernelFile, SystemMonitor, SystemSampler, gpu_reader


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("kind", ["version 2", "version 2 without a limit", "version 1", "machine"])
def test_the_share_of_the_cpu_is_that_of_the_container_or_else_of_the_machine(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    limit = 4.0 if kind in ("version 2", "version 1") else 8.0
    ticks = os.sysconf("SC_CLK_TCK")

    def use(seconds: int) -> None:
        write(tmp_path / "proc" / "stat", f"cpu  {seconds * ticks} 0 0 999 999 0 0 77 0 0\ncpu0 1 2\n")
        if kind.startswith("version 2"):
            write(tmp_path / "cpu.stat", f"usage_usec {seconds * 1000000}\nuser_usec 5\n")
        elif kind == "version 1":
            write(tmp_path / "cpuacct" / "cpuacct.usage", f"{seconds * 1000000000}\n")

    if kind == "version 2":
        write(tmp_path / "cpu.max", "400000 100000\n")
    elif kind == "version 2 without a limit":
        write(tmp_path / "cpu.max", "max 100000\n")
    elif kind == "version 1":
        write(tmp_path / "cpu" / "cpu.cfs_quota_us", "400000\n")
        write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
    use(50)
    usage = CpuUsage(tmp_path, tmp_path / "proc")
    assert usage.share() is None
    clock[0] += 10
    use(70)
    assert usage.share() == pytest.approx(20 / 10 / limit)
    clock[0] += 1
    use(700)
    assert usage.share() == 1
    usage.close()
    assert usage.share() is None


def test_where_the_platform_does_not_tell_nothing_is_logged(tmp_path: Path) -> None:
    usage = CpuUsage(tmp_path, tmp_path)
    assert (usage.share(), usage.share()) == (None, None)
    assert KernelFile(tmp_path / "absent").words() == []


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """NVML of a GPU that is half busy."""
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    module.nvmlInit = lambda: None  # type: ignore[attr-defined]
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid  # type: ignore[attr-defined]
    module.nvmlDeviceGetMemoryInfo = lambda _: SimpleNamespace(used=20, total=80)  # type: ignore[attr-defined]
    module.nvmlDeviceGetUtilizationRates = lambda _: SimpleNamespace(gpu=50)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    return module


def test_the_gpu_is_read_by_its_uuid(nvml: types.ModuleType) -> None:
    assert gpu_reader(torch.device("cuda", 1))() == {"gpu_utilization": 0.5, "gpu_memory": 0.25}


def test_what_nvml_cannot_tell_is_said_once(
    nvml: types.ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise nvml.NVMLError("Not Supported")

    monkeypatch.setattr(nvml, "nvmlDeviceGetUtilizationRates", refuse)
    read = gpu_reader(torch.device("cuda"))
    assert (read(), read()) == ({}, {})
    assert caplog.text.count("GPU utilisation is no longer logged: Not Supported") == 1
    monkeypatch.setattr(nvml, "nvmlInit", refuse)
    assert gpu_reader(torch.device("cuda"))() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_reader(torch.device("cuda"))() == {}
    assert "pip install nvidia-ml-py" in caplog.text


def test_a_fit_logs_what_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "LEAST_SECONDS", 0.0)
    run_dir = fit_here(tmp_path, trainer__log_every_n_steps=2)
    found = scalars(str(run_dir))
    assert [step for step, _ in found["system/rss_gb"]] == [1, 3, 5]
    assert all(0.1 < value < 100 for _, value in found["system/rss_gb"])
    assert all(0 <= value <= 1 for name in ("cpu", "data_wait") for _, value in found[f"system/{name}"])
    assert "system/gpu_utilization" not in found


def open_files() -> list[str]:
    """Files of the kernel that this process has open."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    files = [str(link.readlink()) for link in links if os.path.lexists(link)]
    return sorted(file for file in files if file.endswith(("/statm", "/proc/stat", "/cpu.stat", "/cpuacct.usage")))


@pytest.mark.parametrize("end", ["teardown", "on_exception"])
def test_files_are_open_on_rank_0_while_it_trains(end: str) -> None:
    monitor = SystemMonitor()
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    assert open_files() == []
    for is_global_zero in (False, True):
        trainer: Any = SimpleNamespace(is_global_zero=is_global_zero, train_dataloader=None)
        monitor.on_train_start(trainer, module)
        assert any(file.endswith("/statm") for file in open_files()) == is_global_zero
    getattr(monitor, end)(trainer, module, RuntimeError() if end == "on_exception" else "fit")
    assert open_files() == []


def test_a_sample_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a file of /proc costs more than reading it."""
    opened = []

    def refuse(path: object, *_: object, **__: object) -> None:
        opened.append(path)
        raise OSError

    sampler = SystemSampler(torch.device("cpu"), waited=0.0)
    sampler.sample(0.0)
    with monkeypatch.context() as patched:
        for module in (io, os, builtins):
            patched.setattr(module, "open", refuse)
        values = sampler.sample(0.0)
    sampler.close()
    assert values.keys() >= {"data_wait", "cpu", "rss_gb"}
    assert opened == []


def test_shares_of_wall_time_add_up() -> None:
    attempts = [
        Attempt(began=0.0, ended=10.0, world_size=1, step=6.0, recomputed=2.0, data_wait=1.0),
        Attempt(began=15.0, ended=20.0, world_size=1, startup=1.0, features=2.0, step=2.0),
    ]
    found = accounting.shares(attempts)
    assert found.pop("goodput") == pytest.approx((4 + 2 + 2) / 20)
    assert found["recomputed"] == pytest.approx(0.1)
    assert sum(found.values()) == pytest.approx(1)
    assert accounting.shares([Attempt(began=1.0, ended=1.0, world_size=1)])["goodput"] == 0
