"""Notice that the machine is being taken away, and stop in time."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from job import temporary
from job.errors import EXIT_PREEMPTED, Preempted

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """While the context lasts, SIGTERM and SIGUSR1 raise a flag instead of ending the process.

    The flag is acted upon at a step boundary, where all ranks agree; nothing collective happens in
    a signal handler (https://github.com/Lightning-AI/pytorch-lightning/issues/20806). Outside of
    the training loop there is nothing to save, and the handler raises
    :class:`~job.errors.Preempted` at once. Whatever the main thread is doing, the process has
    ended ``grace`` seconds after the signal.

    Args:
        grace: seconds from the signal to the end of the process.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.training = False
        self._requested = threading.Event()
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank was told to stop."""
        return self._requested.is_set()

    def __enter__(self) -> Preemption:
        # A thread learns of a signal through a pipe even while the main thread waits in C, for another rank say.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="preemption", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._writer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested.set()
        if not self.training:
            self.training = True  # a second signal must not interrupt the way out
            raise Preempted(f"stopped by {signal.Signals(number).name} outside of training: nothing was lost.")

    def _watch(self) -> None:
        while received := os.read(self._reader, 1):
            if received[0] in SIGNALS:
                break
        else:
            os.close(self._reader)
            return
        self._requested.set()
        log.warning("%s: stopping within %.0f s", signal.Signals(received[0]).name, self.grace)
        time.sleep(self.grace)
        print(
            f"job: could not stop cleanly within {self.grace:.0f} s of the signal: the next start goes on from the "
            "last committed checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        temporary.remove_all()
        os._exit(EXIT_PREEMPTED)
