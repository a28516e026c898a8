"""Preparation of the process that ranks are forked from; imported by that process alone, as the first module.

It leaves the process group of the launcher, and the ranks with it: an init program of a container, or a terminal,
signals the whole group, but torch's elastic agent signals each rank. Signals to this process itself have no effect,
because it reports the exit codes of the ranks. It is killed when the launcher is, and then the ranks receive SIGTERM.
"""

import os
import signal

from job.process.parent_death import signal_at_parent_death
from job.process.signals import STOP_SIGNALS

os.setsid()
signal_at_parent_death(signal.SIGKILL)
for number in STOP_SIGNALS:
    if signal.getsignal(number) != signal.SIG_IGN:
        # Not SIG_IGN, which ranks would inherit and take for that of nohup.
        signal.signal(number, lambda *_: None)
