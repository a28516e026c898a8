"""Stop signals: end with one line and the exit code that a shell reports, without a traceback.

Imported before anything large, so nothing else than the standard library and :mod:`job.process.log_format` is.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn, TypeVar

from job.process import log_format

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""SIGINT is Ctrl-C, SIGHUP the end of a terminal; schedulers send SIGTERM, some SIGUSR1 before it."""

Self = TypeVar("Self", bound="StopSignals")


class Stopped(BaseException):
    """Raised in the main thread by a signal; no ``except Exception`` of a library catches it.

    Attributes:
        exit_code: of the process, see :func:`exit_code`.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.message = message
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.message


def exit_code(number: int) -> int:
    """128 + the signal, as a shell reports it; SIGUSR1 announces a SIGTERM and ends with its code."""
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)


def end_at_once(code: int | None = None) -> None:
    """Outside of a :class:`StopSignals`, let a signal end the process at once.

    Args:
        code: exit code of a process that has finished its work; None: it is still starting.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if code is not None:
            os._exit(code)
        _end_now(f"stopped by {signal.Signals(number).name} while starting: nothing was begun.", number)

    for number in _handled():
        signal.signal(number, end)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """While the context lasts, a signal ends the process at once, as :func:`end_at_once` says."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _handled()}
    end_at_once()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """While the context lasts, the first signal raises :class:`Stopped` in the main thread.

    Whatever the main thread is doing, such as waiting in C for another rank, the process ends ``grace`` seconds after
    the first signal, and at once at a second Ctrl-C. Signals that were ignored when the process began, as nohup does
    with SIGHUP, stay ignored.

    Args:
        grace: seconds; None: no limit, for a process whose children have one.
        at_end: called before the process is ended from outside of the main thread.
        owns_process: end the process at a second Ctrl-C; else, in a notebook say, raise :class:`Stopped` there.

    Attributes:
        consequence: of an end from outside of the main thread, for the message.
    """

    consequence = "a restart resumes from the last committed checkpoint, if there is one."

    def __init__(
        self,
        grace: float | None = 10.0,
        at_end: Callable[[], None] = lambda: None,
        *,
        owns_process: bool = True,
    ) -> None:
        self.grace = grace
        self.at_end = at_end
        self.owns_process = owns_process
        self.first: signal.Signals | None = None
        self._received: list[int] = []
        self._deadline: float | None = None
        self._before: dict[signal.Signals, object] = {}
        self._terminals: list[int] = []

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.first is not None

    @property
    def exit_code(self) -> int:
        """Exit code of a process that stops on request; SIGTERM's where another rank received the signal."""
        return exit_code(self.first or signal.SIGTERM)

    def on_first(self, number: signal.Signals) -> None:
        """Act on the first signal, in the main thread."""
        raise Stopped(f"stopped by {number.name}.", exit_code(number))

    def announce(self, number: signal.Signals) -> None:
        """Log the first signal, in a thread."""

    def __enter__(self: Self) -> Self:
        self.active = threading.current_thread() is threading.main_thread()  # Python only allows handlers there
        if not self.active:
            return self
        # A thread that reads the wakeup pipe sees a signal even while the main thread waits in C.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        for number in _handled():
            self._before[number] = signal.signal(number, self._on_signal)
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.active:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        owners = (getattr(handler, "__self__", None) for handler in self._before.values())
        outer = next((owner for owner in owners if isinstance(owner, StopSignals)), None)
        if outer is not None and self.first is not None:
            outer._continue(self, self.first)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._deadline = None
        self._received = []
        os.close(self._writer)

    def _continue(self, inner: StopSignals, first: signal.Signals) -> None:
        """Take over from an ``inner`` context: its ``first`` signal has been handled, and its deadline holds.

        The inner context's thread may not have read the signal yet.
        """
        self.first, self._received = first, list(inner._received) or [first]
        self.grace, self._deadline = inner.grace, inner._deadline
        if self._deadline is None and self.grace is not None:
            self._deadline = time.monotonic() + self.grace
        os.write(self._writer, b"\0")  # wakes the thread, which then reads the deadline

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = signal.Signals(number)
            if number == signal.SIGHUP and self.owns_process:
                self._leave_terminal()
            self.on_first(self.first)
        elif number == signal.SIGINT and not self.owns_process:
            raise Stopped("stopped at once by a second Ctrl-C: what was not saved is lost.", exit_code(number))

    def _leave_terminal(self) -> None:
        """Redirect output to /dev/null when the terminal is gone: each write would raise an error."""
        null_device = os.open(os.devnull, os.O_WRONLY)
        for fd in self._terminals:
            os.dup2(null_device, fd)
        os.close(null_device)

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN | select.POLLHUP)
        while True:
            remaining = None if self._deadline is None else max(self._deadline - time.monotonic(), 0)
            if not poll.poll(None if remaining is None else 1000 * remaining) and self._deadline is not None:
                self._end(
                    f"could not stop cleanly within {self.grace or 0:.0f} s of the signal: {self.consequence}",
                    next(iter(self._received), self.first or signal.SIGTERM),
                )
            numbers = os.read(self._reader, 64)
            if not numbers:
                os.close(self._reader)
                return
            for number in numbers:
                if number not in self._before:
                    continue
                self._received.append(number)
                if len(self._received) == 1:
                    self._deadline = None if self.grace is None else time.monotonic() + self.grace
                    self.announce(signal.Signals(number))
                elif self._received.count(signal.SIGINT) > 1 and self.owns_process:
                    self._end("stopped at once by a second SIGINT: what was not saved is lost.", signal.SIGINT)

    def _end(self, message: str, number: int) -> NoReturn:
        self.at_end()
        _end_now(message, number)


def _handled() -> list[signal.Signals]:
    """Stop signals that are not ignored, as nohup ignores SIGHUP."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def _end_now(message: str, number: int) -> NoReturn:
    try:
        sys.stdout.flush()
        os.write(2, f"{log_format.final_line(f'job: {message}', 'WARNING')}\n".encode())
    except (OSError, ValueError, RuntimeError):  # the terminal is gone, or the main thread is writing
        pass
    os._exit(exit_code(number))
