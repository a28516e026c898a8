"""Preemption: a signal to stop becomes a flag, which the training loop acts upon after saving."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import TracebackType

from job.errors import Preempted
from job.process import temporary
from job.process.signals import Stopped, StopSignals, exit_code

log = logging.getLogger(__name__)


class Preemption(StopSignals):
    """While the context lasts, a signal to stop raises a flag instead of ending the process.

    The flag is acted upon at a step boundary, where all ranks agree; nothing collective happens in
    a signal handler (https://github.com/Lightning-AI/pytorch-lightning/issues/20806). Outside of
    the training loop there is nothing to save, and the handler raises :class:`~job.process.signals.Stopped`
    at once.

    Args:
        grace: seconds from the signal to the end of the process; None: no limit.
        owns_process: end the process at a second Ctrl-C; else raise Stopped.
    """

    def __init__(self, grace: float | None, *, owns_process: bool = True) -> None:
        super().__init__(grace, at_end=temporary.remove_all, owns_process=owns_process)
        self._deferred = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Training, which saves at the next step boundary and stops; elsewhere a signal ends the process at once."""
        self._deferred = True
        yield
        self._deferred = False  # not after an error: a signal must not interrupt its handling

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Preempted):
            error.exit_code = self.exit_code
        super().__exit__(kind, error, traceback)

    def on_first(self, number: signal.Signals) -> None:
        """Raise outside of training alone."""
        if not self._deferred:
            raise Stopped(
                f"stopped by {number.name} outside of training: nothing was lost. The same command starts it again.",
                exit_code(number),
            )

    def announce(self, number: signal.Signals) -> None:
        """Log that the state is being saved."""
        if self._deferred:
            within = "" if self.grace is None else f", within {self.grace:.0f} s"
            log.warning(
                "%s: saving the state, then stopping%s. A second Ctrl-C ends it at once, without saving.",
                number.name,
                within,
            )
