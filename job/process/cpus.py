"""CPUs of this process."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """CPUs that this process may run on; all of the machine where the platform has no affinity, as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
