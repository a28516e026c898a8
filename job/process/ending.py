"""The end of a process that has failed."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from job.process import temporary


def end_process(code: int) -> NoReturn:
    """End the process now: threads and process groups of a failed run may wait forever."""
    flush_output()
    temporary.remove_all()
    os._exit(code)


def flush_output() -> None:
    """Flush stdout and stderr, if they are still open."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe or terminal that is gone
            stream.flush()
