"""Watchdog: a thread ends a process that makes no progress."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec
import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from job import typed
from job.cluster import ranks
from job.errors import EXIT_RETRY, ConfigError
from job.process import logs, temporary
from job.process.periodic import Periodic, call_within
from job.torch_internals import connect_default_store

log = logging.getLogger(__name__)

WARM_UP = 3
"""Beats of a phase before its limit follows from what was measured."""

REMEMBERED = 100
"""Beats the limit follows from."""


CHECK_SECONDS = 5.0
"""Most seconds between two checks."""

STORE_SECONDS = 10.0
"""How long the states of the other ranks are waited for before the end of this one."""


class Pulse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """State of a rank, published to the others.

    Attributes:
        phase: what it is doing.
        step: its ``global_step``.
        waiting: seconds since it made progress.
        published_at: time of publication, in seconds since 1970, by its own clock.
    """

    phase: Annotated[str, msgspec.Meta(max_length=100)]
    step: Annotated[int, msgspec.Meta(ge=0)]
    waiting: Annotated[float, msgspec.Meta(ge=0)]
    published_at: float


class Progress(NamedTuple):
    """The last progress of this rank, replaced as a whole: threads read a consistent state.

    Attributes:
        phase: what the rank is doing.
        step: its ``global_step``.
        at: time of the progress, by ``time.monotonic``.
        limit: seconds after which the rank is ended without further progress.
    """

    phase: str
    step: int
    at: float
    limit: float


@dataclass(frozen=True)
class WatchdogSettings:
    """Ends this process when a step takes far longer than those before; the launcher then ends the others.

    Args:
        min_seconds: lower bound of the limit on a step.
        factor: the limit is this factor times the longest of the last 100 steps.
        startup_seconds: limit of the first steps (which compile and warm up), of everything between
            steps (saving, the start of a validation), and of a collective between ranks.
    """

    min_seconds: float = 60.0
    factor: float = 10.0
    startup_seconds: float = 1200.0

    def __post_init__(self) -> None:
        if self.min_seconds <= 0 or self.factor < 1 or self.startup_seconds < self.min_seconds:
            raise ConfigError(
                "--watchdog.min_seconds must be above 0 and at most startup_seconds, --watchdog.factor at least 1."
            )


class Watchdog(Callback):
    """Ends this process when a step takes far longer than those before; the launcher then ends the others.

    Args:
        settings: its limits.
        ends_process: end the process that hangs; else only print its stacks.
    """

    def __init__(self, settings: WatchdogSettings, *, ends_process: bool = True) -> None:
        self.settings = settings
        self.ends_process = ends_process
        self._interval = min(settings.min_seconds / 4, CHECK_SECONDS)
        self._progress = Progress("starting", 0, time.monotonic(), settings.startup_seconds)
        self._measured: dict[str, collections.deque[float]] = {}
        self._beats: collections.Counter[str] = collections.Counter()
        self._store: Any = None
        self._threads: list[Periodic] = []
        self._checked_at = time.monotonic()
        self._paused: tuple[Progress, float] = (self._progress, 0.0)
        self._stage: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start watching."""
        if dist.is_initialized():
            self._store = connect_default_store()
        self._checked_at = time.monotonic()
        # Two threads: a store that does not answer must not keep the first one from its work.
        self._threads = [Periodic("watchdog", self._interval, self._watch)]
        if self._store is not None:
            self._threads.append(Periodic("watchdog-pulse", self._interval, self._publish))

    @contextlib.contextmanager
    def stopped_at_end(self) -> Iterator[None]:
        """Watch no longer than the context lasts, however it ends: Lightning tears nothing down after an exception."""
        try:
            yield
        finally:
            for thread in self._threads:
                thread.stop()
            self._threads = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A step begins: the wait for its data counts as part of it."""
        if (stage := pl_module.stage) != self._stage:  # other layers train: where steps are compiled, this one is anew
            self._stage = stage  # type: ignore[assignment]
            self._measured.pop("training", None)
            self._beats.pop("training", None)
        self.beat("training", trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """A step is over; what follows may be a save or the start of a validation."""
        self.beat("training", trainer.global_step)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """A batch of validation begins."""
        self.beat("validating", trainer.global_step)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """A batch of validation is over."""
        self.beat("validating", trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of an epoch saves and may unfreeze layers."""
        self._expect_anything("between epochs", trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loader processes start."""
        self._expect_anything("validating", trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A save may wait for the one before."""
        self._expect_anything("saving", trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Uploads may follow."""
        self._expect_anything("finishing", trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Uploads may follow."""
        self._expect_anything("stopping", trainer.global_step)

    def beat(self, phase: str, step: int) -> None:
        """A step of ``phase`` is over."""
        now = time.monotonic()
        measured = self._measured.setdefault(phase, collections.deque(maxlen=REMEMBERED))
        if self._progress.phase == phase and self._beats[phase] > 2 * WARM_UP:
            measured.append(now - self._progress.at)
        self._beats[phase] += 1
        limit = self.settings.startup_seconds
        if measured:
            limit = max(self.settings.min_seconds, self.settings.factor * max(measured))
        self._progress = Progress(phase, step, now, limit)

    def _expect_anything(self, phase: str, step: int) -> None:
        self._progress = Progress(phase, step, time.monotonic(), self.settings.startup_seconds)

    def _watch(self) -> None:
        progress, waiting = self._waiting()
        if waiting > progress.limit and self._progress is progress:
            self._end(progress, waiting)

    def _waiting(self) -> tuple[Progress, float]:
        """The last progress, and the seconds since then in which this process ran.

        A process that was stopped (SIGSTOP, a suspended machine) has this thread late, too: that time does not count.
        """
        progress, now = self._progress, time.monotonic()
        late = max(now - self._checked_at - 2 * self._interval, 0.0)
        self._checked_at = now
        before, paused = self._paused
        self._paused = (progress, late + (paused if before is progress else 0.0))
        return progress, max(now - progress.at - self._paused[1], 0.0)

    def _publish(self) -> None:
        progress = self._progress
        waiting = max(time.monotonic() - progress.at, 0.0)
        pulse = Pulse(progress.phase, progress.step, round(waiting, 1), time.time())
        with contextlib.suppress(RuntimeError, OSError):  # the store ends with its host, which shows elsewhere
            self._store.set(f"pulse/{ranks.rank()}", msgspec.json.encode(pulse).decode())

    def _end(self, progress: Progress, waiting: float) -> None:
        action = ": ending it" if self.ends_process else ""
        message = (
            f"job: rank {ranks.rank()} has made no progress for {waiting:.0f} s, {progress.phase} at step "
            f"{progress.step} (limit {progress.limit:.0f} s){action}."
        )
        if logs.is_json():
            logs.report(f"{message}\n{self._others()}", stack_trace=_stacks())
        else:
            faulthandler.dump_traceback(all_threads=True, file=2)  # sys.stderr of a notebook is no file
            print(f"{message} Its stacks stand above.\n{self._others()}", file=sys.stderr, flush=True)
        if not self.ends_process:
            self._progress = progress._replace(at=time.monotonic())
            return
        temporary.remove_all()
        os._exit(EXIT_RETRY)

    def _others(self) -> str:
        """The last published state of every rank, which shows the one that hangs and those that wait for it."""
        pulses: dict[int, Pulse] = {}
        with contextlib.suppress(TimeoutError):
            call_within(STORE_SECONDS, lambda: self._read_pulses(pulses), "reading the states of the other ranks")
        lines = []
        for rank in range(ranks.world_size()):
            if (pulse := pulses.get(rank)) is None:
                lines.append(f"job: rank {rank}: has published no state")
            else:
                silent = time.time() - pulse.published_at
                lines.append(
                    f"job: rank {rank}: {pulse.phase}, step {pulse.step}, no progress for {pulse.waiting:.0f} s, "
                    f"last state published {silent:.0f} s ago"
                    + (": this rank is stopped or gone" if silent > 20 else "")
                )
        return "\n".join(lines)

    def _read_pulses(self, pulses: dict[int, Pulse]) -> None:
        for rank in range(ranks.world_size()):
            key = f"pulse/{rank}"
            with contextlib.suppress(RuntimeError, OSError, ValueError):
                if self._store is not None and self._store.check([key]):
                    pulses[rank] = typed.from_json(self._store.get(key), Pulse)


def _stacks() -> str:
    """The stacks of all threads."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile("w+") as file:  # OSError: a full disk
        faulthandler.dump_traceback(all_threads=True, file=file)
        file.seek(0)
        return file.read()
    return ""
