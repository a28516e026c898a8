"""No rank waits for ever: a thread ends a process that makes no progress."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from job.cluster import ranks
from job.errors import EXIT_RETRY, ConfigError
from job.model.freeze import Stage
from job.periodic import Periodic

log = logging.getLogger(__name__)

WARM_UP = 3
"""Beats of a phase before its limit follows from what was measured."""

REMEMBERED = 100
"""Beats the limit follows from."""


@dataclass
class Pulse:
    """What a rank tells the others of itself.

    Attributes:
        phase: what it is doing.
        step: its ``global_step``.
        waiting: seconds since it made progress.
        told: seconds since the epoch, by its own clock, when it said so.
    """

    phase: str = "starting"
    step: int = 0
    waiting: float = 0.0
    told: float = 0.0


class Watchdog(Callback):
    """Ends this process when a step takes far longer than those before; torchrun then ends the others.

    Args:
        min_seconds: no limit is shorter.
        factor: a limit is this many times the longest of the last 100 steps.
        startup_seconds: limit of the first steps (which compile and warm up), of everything between
            steps (saving, the start of a validation), and of a collective between ranks.
    """

    def __init__(self, min_seconds: float = 60.0, factor: float = 10.0, startup_seconds: float = 1200.0) -> None:
        if min_seconds <= 0 or factor < 1 or startup_seconds < min_seconds:
            raise ConfigError(
                "--watchdog.min_seconds must be above 0 and at most startup_seconds, --watchdog.factor at least 1."
            )
        self.min_seconds = min_seconds
        self.factor = factor
        self.startup_seconds = startup_seconds
        self._pulse = Pulse()
        self._last_beat = time.monotonic()
        self._limit = startup_seconds
        self._measured: dict[str, collections.deque[float]] = {}
        self._beats: collections.Counter[str] = collections.Counter()
        self._store: Any = None
        self._thread: Periodic | None = None
        self._stage: Stage | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start watching."""
        if dist.is_initialized():
            # A connection of its own: the main thread may hold the other one while it waits.
            self._store = dist.distributed_c10d._get_default_store().clone()
        self._thread = Periodic("watchdog", min(self.min_seconds / 4, 5.0), self._watch)

    @contextlib.contextmanager
    def stopped_at_end(self) -> Iterator[None]:
        """Watch no longer than the context lasts, however it ends: Lightning tears nothing down after an exception."""
        try:
            yield
        finally:
            if self._thread is not None:
                self._thread.stop()
                self._thread = None

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
        """What is left is uploaded."""
        self._expect_anything("finishing", trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """What is left is uploaded."""
        self._expect_anything("stopping", trainer.global_step)

    def beat(self, phase: str, step: int) -> None:
        """A step of ``phase`` is over."""
        now = time.monotonic()
        measured = self._measured.setdefault(phase, collections.deque(maxlen=REMEMBERED))
        if self._pulse.phase == phase and self._beats[phase] > 2 * WARM_UP:
            measured.append(now - self._last_beat)
        self._beats[phase] += 1
        limit = max(self.min_seconds, self.factor * max(measured)) if measured else self.startup_seconds
        self._pulse, self._last_beat, self._limit = Pulse(phase, step), now, limit

    def _expect_anything(self, phase: str, step: int) -> None:
        self._pulse, self._last_beat, self._limit = Pulse(phase, step), time.monotonic(), self.startup_seconds

    def _watch(self) -> None:
        waiting = time.monotonic() - self._last_beat
        pulse = Pulse(self._pulse.phase, self._pulse.step, round(waiting, 1), time.time())
        if self._store is not None:
            try:
                self._store.set(f"pulse/{ranks.rank()}", json.dumps(asdict(pulse)))
            except (RuntimeError, OSError):  # the store ends with its host, which this rank will notice elsewhere
                self._store = None
        if waiting > self._limit:
            self._end(pulse)

    def _end(self, pulse: Pulse) -> None:
        faulthandler.dump_traceback(all_threads=True)
        print(
            f"job: rank {ranks.rank()} has made no progress for {pulse.waiting:.0f} s, {pulse.phase} at step "
            f"{pulse.step} (limit {self._limit:.0f} s): ending it. Its stacks stand above.\n{self._others()}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_RETRY)

    def _others(self) -> str:
        """What every rank last said, to tell the one that hangs from those that wait for it."""
        lines = []
        for rank in range(ranks.world_size()):
            key = f"pulse/{rank}"
            try:
                known = self._store is not None and self._store.check([key])
                pulse = Pulse(**json.loads(self._store.get(key))) if known else None
            except (RuntimeError, OSError):
                pulse = None
            if pulse is None:
                lines.append(f"job: rank {rank}: never heard of")
            else:
                silent = time.time() - pulse.told
                lines.append(
                    f"job: rank {rank}: {pulse.phase}, step {pulse.step}, no progress for {pulse.waiting:.0f} s, "
                    f"last heard of {silent:.0f} s ago" + (": this rank is stopped or gone" if silent > 20 else "")
                )
        return "\n".join(lines)
