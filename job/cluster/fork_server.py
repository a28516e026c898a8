"""Preparation of the process that ranks are forked from; imported by that process alone, as the first module.

It leaves the process group of the launcher, and the ranks with it: an init program of a container, or a terminal,
signals the whole group, but a rank is to be signalled once, by torch's elastic agent, and this process not at all.
It is killed when the launcher is, and then the ranks receive SIGINT (``torch.multiprocessing`` asks the kernel for it).
"""

import contextlib
import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
"""prctl(2)."""

os.setsid()
with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
