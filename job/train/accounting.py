"""Where the time of a run went, over all its starts: goodput and what is not good about it.

``<run_dir>/accounting.json`` holds one record for each start; rank 0 renews its own every few
seconds, so that the record of a killed start is nearly complete.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job import storage
from job.errors import LeaseError, StorageError, StorageOutage
from job.periodic import Periodic
from job.train.checkpointer import Checkpointer
from job.train.feature_cache import FeatureCache

log = logging.getLogger(__name__)

FILE = "accounting.json"
RENEW_SECONDS = 10.0
"""Seconds between two writes of a small record."""

BYTES_PER_SECOND = 50.0
"""A larger record is written less often, so that a bucket that keeps superseded versions keeps 4.3 MB a day at most."""


@dataclass
class Start:
    """One start of the run, in seconds, on rank 0.

    Attributes:
        began: when the process began, since the epoch.
        ended: when this record was last renewed.
        world_size: processes.
        first_step: ``global_step`` that it went on from.
        last_step: ``global_step`` it reached.
        startup: from the process's beginning to its first step, without ``features``.
        features: computing or fetching what the frozen backbone gives.
        step: forward, backward, communication and optimizer.
        data_wait: waiting for the next batch.
        validation: validating.
        checkpoint_stall: training stood still for a checkpoint.
        lost: ``step`` seconds that the next start had to do again.
    """

    began: float
    ended: float
    world_size: int
    first_step: int = 0
    last_step: int = 0
    startup: float = 0.0
    features: float = 0.0
    step: float = 0.0
    data_wait: float = 0.0
    validation: float = 0.0
    checkpoint_stall: float = 0.0
    lost: float = 0.0


def read(run_dir: str) -> list[Start]:
    """The records of a run, in order; none, with a word in the log, where they cannot be read."""
    uri = storage.join(run_dir, FILE)
    if not storage.exists(uri):
        return []
    try:
        return [Start(**record) for record in json.loads(storage.read_bytes(uri))]
    except (ValueError, TypeError) as error:
        log.warning("%s cannot be read, the accounting begins anew: %s", uri, error)
        return []


def totals(starts: list[Start]) -> dict[str, float]:
    """Sums over all starts, in seconds; ``other`` is what no record explains, the time between starts above all.

    ``goodput`` is the share of the wall time since the first start that went into steps which counted.
    """
    wall = starts[-1].ended - starts[0].began
    names = ("startup", "features", "step", "data_wait", "validation", "checkpoint_stall", "lost")
    sums = {name: sum(getattr(start, name) for start in starts) for name in names}
    sums["step"] -= sums["lost"]
    return {"goodput": sums["step"] / wall, "wall": wall, **sums, "other": wall - sum(sums.values())}


class Accounting(Callback):
    """Measures this start, and keeps ``accounting.json`` on rank 0.

    Args:
        checkpointer: knows how long training stood still for checkpoints.
        features: knows how long the features took.
        before_write: called immediately before each write; raises if this job may not write to run_dir.
    """

    def __init__(
        self, checkpointer: Checkpointer, features: FeatureCache, before_write: Callable[[], None] = lambda: None
    ) -> None:
        self.checkpointer = checkpointer
        self.features = features
        self.before_write = before_write
        self.interval = RENEW_SECONDS
        self.earlier: list[Start] = []
        self.start = Start(began=_process_began(), ended=time.time(), world_size=1)
        self._step_began: float | None = None
        self._validation_began = 0.0
        self._waited_in_startup = 0.0
        self._renewal: Periodic | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the records of earlier starts, and what the last one lost."""
        self.start.world_size = trainer.world_size
        self.start.first_step = self.start.last_step = trainer.global_step
        if trainer.is_global_zero:
            self.earlier = read(trainer.default_root_dir)
            if self.earlier:
                last = self.earlier[-1]
                done, again = last.last_step - last.first_step, last.last_step - trainer.global_step
                last.lost = last.step * max(again, 0) / done if done > 0 else 0.0
            self._run_dir = trainer.default_root_dir
            self.write()
            self._renewal = Periodic("accounting", lambda: self.interval, self.write)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """A step begins."""
        self._step_began = time.monotonic()
        if not self.start.startup:
            self.start.features = self.features.seconds
            self.start.startup = time.time() - self.start.began - self.start.features
            self._waited_in_startup = self._waited(trainer)

    def between_steps(self, trainer: pl.Trainer) -> None:
        """A step is over."""
        self._end_step(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step is over, and a validation begins."""
        self._end_step(trainer)
        self._validation_began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation is over."""
        self.start.validation += time.monotonic() - self._validation_began

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the totals so far."""
        self._end_step(trainer)
        if trainer.is_global_zero:
            self._refresh()
            values = {f"accounting/{name}": value for name, value in totals([*self.earlier, self.start]).items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the record."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the record, unless it is the bucket that fails."""
        self._close(write=not isinstance(exception, StorageOutage))

    def write(self) -> None:
        """Renew the record; a bucket out of reach delays it."""
        self._refresh()
        text = json.dumps([asdict(start) for start in (*self.earlier, self.start)], indent=2)
        self.interval = max(RENEW_SECONDS, len(text) / BYTES_PER_SECOND)
        with contextlib.suppress(StorageError, LeaseError):
            storage.write_text(storage.join(self._run_dir, FILE), text, self.before_write)

    def _close(self, *, write: bool = True) -> None:
        if self._renewal is not None:
            self._renewal.stop()
            self._renewal = None
            if write:
                self.write()

    def _refresh(self) -> None:
        self.start.ended = time.time()
        self.start.checkpoint_stall = self.checkpointer.stall_seconds

    def _waited(self, trainer: pl.Trainer) -> float:
        loader = trainer.train_dataloader
        seconds: float = loader.wait_seconds if loader is not None else 0.0
        return seconds

    def _end_step(self, trainer: pl.Trainer) -> None:
        self.start.data_wait = self._waited(trainer) - self._waited_in_startup
        if self._step_began is not None:
            self.start.step += time.monotonic() - self._step_began
            self.start.last_step = trainer.global_step
            self._step_began = None


def _process_began() -> float:
    """When this process began, in seconds since the epoch (proc(5)); where that is not known, now."""
    with contextlib.suppress(OSError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / 100
    return time.time()
