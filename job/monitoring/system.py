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
from job.process.cpus import CGROUP, cpu_limit

log = logging.getLogger(__name__)

PROC = Path("/proc")
LEAST_SECONDS = 1.0
"""Between two samples: a shorter share of CPU or GPU says little."""


class SystemMonitor(Callback):
    """Logs ``system/…`` on rank 0 when Lightning logs: the values of its own process, GPU and machine.

    No rank waits for another one. Ranks do the same work: rank 0 represents all.
    """

    def __init__(self) -> None:
        self._sampler: SystemSampler | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure."""
        if trainer.is_global_zero:
            self._close()
            self._sampler = SystemSampler(pl_module.device, _wait_seconds(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Log a sample, if one is due."""
        if self._sampler is None or self._sampler.age < LEAST_SECONDS or not logs_are_due(trainer):
            return
        values = {f"system/{name}": value for name, value in self._sampler.sample(_wait_seconds(trainer)).items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the files."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the files."""
        self._close()

    def _close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None


class SystemSampler:
    """Samples of this process, its GPU and the machine.

    Args:
        device: of the training; a GPU is sampled, too.
        waited: seconds that training has waited for data so far.
    """

    def __init__(self, device: torch.device, waited: float) -> None:
        self._cpu = CpuUsage()
        self._memory = KernelFile(PROC / "self" / "statm")
        self._gpu: Callable[[], dict[str, float]] = gpu_reader(device) if device.type == "cuda" else dict
        self._cpu.share()
        self._sampled, self._waited = time.monotonic(), waited

    @property
    def age(self) -> float:
        """Seconds since the last sample."""
        return time.monotonic() - self._sampled

    def sample(self, waited: float) -> dict[str, float]:
        """Values since the last sample, by name.

        Args:
            waited: seconds that training has waited for data so far.
        """
        now = time.monotonic()
        values = {"data_wait": min(max((waited - self._waited) / max(now - self._sampled, 1e-9), 0.0), 1.0)}
        self._sampled, self._waited = now, waited
        if (share := self._cpu.share()) is not None:
            values["cpu"] = share
        if pages := self._memory.words():
            values["rss_gb"] = int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
        return {**values, **self._gpu()}

    def close(self) -> None:
        """Close the files."""
        self._cpu.close()
        self._memory.close()


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

    def close(self) -> None:
        """Close the file, which has no words from then on."""
        if self._file is not None:
            self._file.close()
            self._file = None


class CpuUsage:
    """Share of the machine's CPU time that is used; in a container, of what the container may use.

    The counters are those of the cgroup at the root of what the process sees: in a container that is its own, and
    elsewhere the machine's. (psutil reads the machine's also in a container.)

    Args:
        cgroup: folder of the cgroup filesystem, version 2 or 1.
        proc: folder of the proc filesystem.
    """

    def __init__(self, cgroup: Path = CGROUP, proc: Path = PROC) -> None:
        self._limit = cpu_limit(cgroup) or float(os.cpu_count() or 1)
        self._version_2 = KernelFile(cgroup / "cpu.stat")
        self._version_1 = KernelFile(cgroup / "cpuacct" / "cpuacct.usage")
        self._machine = KernelFile(proc / "stat")
        self._before: tuple[float, float] | None = None

    def share(self) -> float | None:
        """From 0 to 1, since the last call; None at the first one. None if unavailable."""
        used, now, before = self._seconds(), time.monotonic(), self._before
        if used is None:
            return None
        self._before = used, now
        if before is None or now <= before[1]:
            return None
        return min(max((used - before[0]) / (now - before[1]) / self._limit, 0.0), 1.0)

    def close(self) -> None:
        """Close the files."""
        for file in (self._version_2, self._version_1, self._machine):
            file.close()

    def _seconds(self) -> float | None:
        if (words := self._version_2.words())[:1] == [b"usage_usec"]:
            return int(words[1]) / 1e6
        if words := self._version_1.words():
            return int(words[0]) / 1e9
        if words := self._machine.words():
            user, nice, system, _idle, _iowait, irq, softirq = map(int, words[1:8])  # proc(5)
            return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return None


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
