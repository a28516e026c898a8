"""CPUs of this process."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus() -> int:
    """CPUs that this process may run on; all of the machine where the platform has no affinity, as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def multiplies_bf16() -> bool:
    """Whether the CPU has AMX or AVX512-BF16, by the kernel's list of its features; False without /proc, as on macOS.

    ``torch.cpu.get_capabilities`` is public only in releases after torch 2.9, the oldest supported.
    """
    try:
        features = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"amx_tile", "avx512_bf16"}.isdisjoint(features)
