"""Progress of a long task: a bar on a terminal, else one log line every few seconds, with the same facts."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from job.process import logs
from job.process.log_format import can_redraw
from job.process.terminal import escape, say

log = logging.getLogger(__name__)

DRAW_SECONDS = 0.2
"""Time between two drawings of a bar, which take 0.6 ms each."""
BAR_MIN, BAR_MAX = 6, 40
"""Width of a bar in characters."""
SHORT_SECONDS = 0.5
"""Time from the start within which a rate says nothing about the rest."""

Self = TypeVar("Self", bound="Progress")


@dataclass(frozen=True)
class Status:
    """What a person wants to know of a task that runs.

    Attributes:
        task: name of the task.
        done: units done.
        total: units in all; None: unknown.
        unit: plural of what is counted.
        facts: further numbers by name, such as metrics.
        rate: ``rate_unit`` per second.
        rate_unit: plural of what the rate counts.
        seconds_left: estimate of the time until the task ends; None: unknown.
    """

    task: str
    done: int
    total: int | None
    unit: str
    facts: Mapping[str, float] = field(default_factory=dict)
    rate: float | None = None
    rate_unit: str = ""
    seconds_left: float | None = None

    @property
    def count(self) -> str:
        """Units done and in all."""
        return f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"

    @property
    def details(self) -> str:
        """Everything after the count."""
        parts = [f"{name} {value:.4g}" for name, value in self.facts.items()]
        if self.rate is not None:
            parts.append(f"{short_number(self.rate)} {self.rate_unit}/s")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        return "  ".join(parts)

    def __str__(self) -> str:
        return "  ".join(filter(None, [self.task, f"{self.count} {self.unit}", self.details]))

    def fields(self) -> dict[str, object]:
        """Entries of a JSON record."""
        entries: dict[str, object] = {"task": self.task, "done": self.done, "total": self.total, "unit": self.unit}
        entries |= self.facts
        if self.rate is not None:
            entries[f"{self.rate_unit.replace(' ', '_')}_per_second"] = round(self.rate, 3)
        if self.seconds_left is not None:
            entries["seconds_left"] = round(self.seconds_left, 1)
        return entries


def duration(seconds: float) -> str:
    """Seconds as M:SS, H:MM:SS or D d HH:MM."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def short_number(value: float) -> str:
    """A positive number with three significant digits and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def compact_number(value: float) -> str:
    """A number of at least 1 in at most five characters, for a chart: 9999, 12.5k, 3.4M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        least = 9999.5 if suffix == "k" else 0.9995 * unit  # what rounds to the unit
        if abs(value) >= least:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.4g}"


class Display:
    """Shows the status of tasks on stderr, one after the other; a bar is drawn if stderr is a terminal.

    While a bar is drawn, log records and prints appear above it.

    Args:
        is_shown: whether this process shows anything: usually rank 0.
    """

    def __init__(self, *, is_shown: bool = True) -> None:
        self.is_shown = is_shown
        self.draws = is_shown and can_redraw() and not logs.is_json()
        self.interval = DRAW_SECONDS if self.draws else logs.seconds()
        self._shown_at = time.monotonic()
        self._live: Live | None = None

    @property
    def is_due(self) -> bool:
        """Whether it is time to show the status again."""
        return self.is_shown and time.monotonic() - self._shown_at >= self.interval

    def show(self, status: Status) -> None:
        """Draw the bar, or log a line."""
        if not self.is_shown:
            return
        self._shown_at = time.monotonic()
        if self.draws:
            self._draw(status)
        else:
            self.leave(str(status), status.fields())

    def leave(self, line: str, fields: Mapping[str, object] | None = None) -> None:
        """Leave a line above the bar, or log it.

        Args:
            line: the text.
            fields: entries of the JSON record.
        """
        if self.is_shown and (log.isEnabledFor(logging.INFO) or not self.draws):
            log.info("%s", line, extra={"fields": dict(fields or {})})
        elif self.is_shown:  # a program that has not set up logging
            say(line, file=sys.stderr)

    def close(self) -> None:
        """Remove the bar."""
        if self._live is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._live.stop()
            self._live = None

    def _draw(self, status: Status) -> None:
        with contextlib.suppress(OSError):
            if self._live is None:
                console = _Console(
                    file=sys.stderr, force_terminal=True, soft_wrap=True, markup=False, highlight=False, emoji=False
                )
                self._live = Live(
                    console=console,
                    auto_refresh=False,
                    transient=True,
                    redirect_stdout=sys.stdout.isatty(),  # not of results that are written to a file
                    redirect_stderr=True,
                )
                self._live.start()
            self._live.update(_Bar(status), refresh=True)


class Progress:
    """Progress of a task that counts units: rate, and time left where the total is known.

    A context manager. The bar disappears at the end; a task that took long leaves one line.

    Args:
        task: name of the task, as a noun.
        unit: plural of what is counted.
        total: units in all; None: unknown.
        is_shown: whether this process shows anything: usually rank 0.

    Attributes:
        done: units done.
        share_done: where the total is unknown, the share of the work that is done, if that is known.
    """

    def __init__(self, task: str, unit: str, total: int | None = None, *, is_shown: bool = True) -> None:
        self.task = task
        self.unit = unit
        self.total = total
        self.done = 0
        self.share_done: float | None = None
        self._began = time.monotonic()
        self._display = Display(is_shown=is_shown)

    def advance(self, count: int = 1) -> None:
        """Count units that are done."""
        self.done += count
        if self._display.is_due:
            self._display.show(self.status())

    def update(self, done: int) -> None:
        """Say how many units are done."""
        self.advance(done - self.done)

    def status(self) -> Status:
        """The present status."""
        elapsed = time.monotonic() - self._began
        share = self.done / self.total if self.total else self.share_done
        rate = self.done / elapsed if elapsed >= SHORT_SECONDS and self.done else None
        left = elapsed * max(1 / share - 1, 0.0) if rate is not None and share else None
        return Status(self.task, self.done, self.total, self.unit, rate=rate, rate_unit=self.unit, seconds_left=left)

    def __enter__(self: Self) -> Self:
        if self._display.draws:
            self._display.show(self.status())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.close()
        elapsed = time.monotonic() - self._began
        if kind is None and elapsed >= logs.seconds():
            status = replace(self.status(), seconds_left=None)
            line = f"{self.task}  {self.done:,} {self.unit} in {duration(elapsed)}"
            self._display.leave(f"{line}  {status.details}", status.fields())


class _Console(Console):
    """A console that leaves the cursor visible: a process that is killed could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing."""
        return False


class _Bar:
    """One line: task, bar, count and details, as much as fits."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line; on a narrow terminal the bar is shorter, or left out."""
        status = self.status
        before, after = status.task, "  ".join(filter(None, [f"{status.count} {status.unit}", status.details]))
        free = options.max_width - cell_len(before) - cell_len(after) - 2
        cells: list[RenderableType] = [Text(escape(before), no_wrap=True)]
        if status.total and free >= BAR_MIN:
            cells.append(ProgressBar(total=status.total, completed=status.done, width=min(free, BAR_MAX)))
        cells.append(Text(escape(after), no_wrap=True))
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_row(*cells)
        yield line
