"""The end of a process that has failed."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from job.process import temporary


def end_process(code: int) -> NoReturn:
    """End the process now, without Python's finalization, which would wait for threads or end some of them by an abort.

    Threads and process groups of a failed run may wait forever. A daemon thread that comes back from a torch operation
    while Python finalizes aborts the process: CPython 3.11 ends the thread within a C++ destructor.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe or terminal that is gone
            stream.flush()
    temporary.remove_all()
    os._exit(code)
