"""Processes below this one."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

PARENT, START = 1, 19
"""Places of the parent and of the start, in clock ticks after boot, in :func:`stat_fields`."""


def stat_fields(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` from the state on (proc(5)); None where there is no such process or no /proc."""
    with contextlib.suppress(OSError, ValueError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() or None
    return None


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` has started, and those that they have (proc(5))."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (fields := stat_fields(int(folder.name))) is not None:
            parents[int(folder.name)] = int(fields[PARENT])
    below = [pid]
    for one in below:
        below += [child for child, parent in parents.items() if parent == one]
    return below[1:]


def kill_descendants() -> None:
    """End all processes below this one at once."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
