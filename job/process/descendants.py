"""Child processes of this process, and their children."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

PARENT, START = 1, 19
"""Places of the parent's PID and of the start time, in clock ticks after boot, in :func:`stat_fields`."""


def stat_fields(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` from the state on (proc(5)); None where there is no such process or no /proc."""
    with contextlib.suppress(OSError, ValueError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() or None
    return None


def descendants(pid: int) -> list[int]:
    """PIDs of all descendants of ``pid``; none on a system without proc(5)."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (fields := stat_fields(int(folder.name))) is not None:
            parents[int(folder.name)] = int(fields[PARENT])
    pids = [pid]
    for ancestor in pids:
        pids += [child for child, parent in parents.items() if parent == ancestor]
    return pids[1:]


def kill_descendants() -> None:
    """Kill all descendants of this process."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
