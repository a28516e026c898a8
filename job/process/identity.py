"""Identity of a process among all machines and containers, and whether such a process still runs."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Annotated

import msgspec

from job.process.descendants import START, stat_fields

Name = Annotated[str, msgspec.Meta(max_length=300)]


class ProcessId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process, by everything that its PID depends on.

    Attributes:
        host: name of its machine or container; for messages only, since names repeat.
        pid: its PID.
        boot: boot_id of the kernel (random(4)), which no two running kernels share; None where there is none.
        namespace: its PID namespace (namespaces(7)), by which the containers of a machine differ.
        start_time: clock ticks from boot to its start (proc(5)), by which processes with one PID differ.
    """

    host: Name
    pid: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    boot: Name | None = None
    namespace: Name | None = None
    start_time: Name | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_dead(self) -> bool:
        """Whether the process has ended; False where this process cannot know, as on another machine."""
        current = this_process()
        if None in (self.boot, self.namespace, self.start_time):
            return False
        if (self.boot, self.namespace) != (current.boot, current.namespace):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it belongs to another user; hidepid= may hide it in /proc
            pass
        stat = stat_fields(self.pid)
        return stat is not None and (stat[0] in "ZX" or stat[START] != self.start_time)


def this_process() -> ProcessId:
    """The identity of this process."""
    stat = stat_fields(os.getpid())
    return ProcessId(
        host=socket.gethostname(),
        pid=os.getpid(),
        boot=_read("/proc/sys/kernel/random/boot_id"),
        namespace=_link("/proc/self/ns/pid"),
        start_time=None if stat is None else stat[START],
    )


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip() or None
    return None


def _link(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return str(Path(path).readlink())
    return None


def process_age() -> float:
    """Seconds since this process started; 0 where the kernel does not tell, as on macOS."""
    stat = stat_fields(os.getpid())
    if stat is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[START]) / os.sysconf("SC_CLK_TCK"), 0.0)
