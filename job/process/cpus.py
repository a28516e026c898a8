"""CPU cores that this process may use."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """Number of cores, by the CPU affinity of this process where the system has one (macOS has not)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
