"""CPUs of this process."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = CGROUP) -> int:
    """CPUs that this process may use: those of its affinity, or fewer by the CPU limit of its container.

    All CPUs of the machine where the platform has no affinity, as macOS. A limit is rounded down, and is at least one.

    Args:
        cgroup: folder of the cgroup filesystem.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit(cgroup)
    return count if limit is None else max(min(count, int(limit)), 1)


def cpu_limit(cgroup: Path = CGROUP) -> float | None:
    """CPU limit of the container, in CPUs; None without one.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``), and version 1's ``cpu.cfs_quota_us``.

    Args:
        cgroup: folder of the cgroup filesystem, version 2 or 1.
    """
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # "max" and -1: no limit
            quota, period = (int(word) for word in " ".join((cgroup / file).read_text() for file in files).split())
            if quota > 0 and period > 0:
                return quota / period
    return None


def multiplies_bf16() -> bool:
    """Whether the CPU has AMX or AVX512-BF16, by the kernel's list of its features; False without /proc, as on macOS.

    ``torch.cpu.get_capabilities`` is public only in releases after torch 2.9, the oldest supported.
    """
    try:
        features = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"amx_tile", "avx512_bf16"}.isdisjoint(features)
