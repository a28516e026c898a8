"""How busy the machine is: ``system/…`` scalars of GPU, CPU, memory and the wait for data."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from job.errors import first_line
from job.lightning_internals import logs_are_due

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
LEAST_SECONDS = 1.0
"""Between two samples: a shorter share of CPU or GPU says little."""


class SystemMonitor(Callback):
    """Logs ``system/…`` on rank 0 when Lightning logs: the values of its own process, GPU and machine.

    No rank waits for another one. Where all ranks do the same work, one tells how busy they are.
    """

    def __init__(self) -> None:
        self._cpu = CpuUsage()
        self._memory = KernelFile(PROC / "self" / "statm")
        self._gpu: Callable[[], dict[str, float]] = dict
        self._sampled = 0.0
        self._waited = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure."""
        if trainer.is_global_zero and pl_module.device.type == "cuda":
            self._gpu = gpu_reader(pl_module.device)
        self._cpu.share()
        self._sampled, self._waited = time.monotonic(), _wait_seconds(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Log a sample, if one is due."""
        now = time.monotonic()
        if not trainer.is_global_zero or now - self._sampled < LEAST_SECONDS or not logs_are_due(trainer):
            return
        values = {f"system/{name}": value for name, value in self.sample(trainer, now).items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    def sample(self, trainer: pl.Trainer, now: float) -> dict[str, float]:
        """Values since the last sample, by name.

        Args:
            trainer: whose loader is asked for the time that training has waited.
            now: time of the sample, by ``time.monotonic``.
        """
        waited = _wait_seconds(trainer)
        values = {"data_wait": min(max((waited - self._waited) / max(now - self._sampled, 1e-9), 0.0), 1.0)}
        self._sampled, self._waited = now, waited
        if (share := self._cpu.share()) is not None:
            values["cpu"] = share
        if pages := self._memory.words():
            values["rss_gb"] = int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
        return {**values, **self._gpu()}


class KernelFile:
    """A file of the kernel's that is read again and again: opening it costs more than reading.

    Args:
        path: of the file, which may be absent.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] | None = None
        with contextlib.suppress(OSError):
            self._file = path.open("rb", buffering=0)

    def words(self) -> list[bytes]:
        """Its words; none where it cannot be read."""
        if self._file is None:
            return []
        try:
            return os.pread(self._file.fileno(), 4096, 0).split()
        except OSError:
            return []


class CpuUsage:
    """Share of the machine's CPU time that is used; in a container, of what the container may use.

    The counters are those of the cgroup at the root of what the process sees: in a container that is its own, and
    elsewhere the machine's. (psutil reads the machine's also in a container.)

    Args:
        cgroup: folder of the cgroup filesystem, version 2 or 1.
        proc: folder of the proc filesystem.
    """

    def __init__(self, cgroup: Path = CGROUP, proc: Path = PROC) -> None:
        self._limit = _cpus(cgroup)
        self._version_2 = KernelFile(cgroup / "cpu.stat")
        self._version_1 = KernelFile(cgroup / "cpuacct" / "cpuacct.usage")
        self._machine = KernelFile(proc / "stat")
        self._before: tuple[float, float] | None = None

    def share(self) -> float | None:
        """From 0 to 1, since the last call; None at the first one, and where the platform does not tell."""
        used, now, before = self._seconds(), time.monotonic(), self._before
        if used is None:
            return None
        self._before = used, now
        if before is None or now <= before[1]:
            return None
        return min(max((used - before[0]) / (now - before[1]) / self._limit, 0.0), 1.0)

    def _seconds(self) -> float | None:
        if (words := self._version_2.words())[:1] == [b"usage_usec"]:
            return int(words[1]) / 1e6
        if words := self._version_1.words():
            return int(words[0]) / 1e9
        if words := self._machine.words():
            user, nice, system, _idle, _iowait, irq, softirq = map(int, words[1:8])  # proc(5)
            return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return None


def _cpus(cgroup: Path) -> float:
    """CPUs of the limit of a cgroup, else of the machine."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        if (quota_us := int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())) > 0:
            return quota_us / int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
    return float(os.cpu_count() or 1)


def gpu_reader(device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that reads how busy a GPU is and how full its memory, by NVIDIA's management library (NVML).

    Where NVML is missing, a warning says so once, and the function returns an empty dict.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        # CUDA counts the visible devices alone, NVML all of the machine.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except ImportError:
        log.warning("GPU utilisation is not logged. To log it: pip install nvidia-ml-py")
        return dict
    except pynvml.NVMLError as error:
        log.warning("GPU utilisation is not logged: %s", first_line(error))
        return dict
    failed = False

    def read() -> dict[str, float]:
        nonlocal failed
        if failed:
            return {}
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except pynvml.NVMLError as error:  # a part of a GPU (MIG) has no utilisation
            log.warning("GPU utilisation is no longer logged: %s", first_line(error))
            failed = True
            return {}
        return {"gpu_utilization": busy, "gpu_memory": memory.used / memory.total}

    return read


def _wait_seconds(trainer: pl.Trainer) -> float:
    loader = trainer.train_dataloader
    seconds: float = loader.wait_seconds if loader is not None else 0.0
    return seconds
