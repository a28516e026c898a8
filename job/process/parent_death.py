"""A signal at the death of the parent process, from the kernel (prctl(2)); Linux alone has it."""

from __future__ import annotations

import contextlib
import ctypes
import signal

PR_SET_PDEATHSIG = 1


def signal_at_parent_death(number: signal.Signals) -> None:
    """Let the kernel send ``number`` to this process when its parent ends.

    It may be sent several times, once for each thread of the parent that ends.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
