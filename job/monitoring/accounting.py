"""Goodput of a run over all its attempts: the share of time in productive steps, and where the rest went.

``<run_dir>/accounting.json`` holds one record per attempt. Rank 0 rewrites its own while the run lasts, so that the
record of a killed attempt is nearly complete.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import pytorch_lightning as pl
from msgspec import Meta
from pytorch_lightning.callbacks import Callback

from job import storage, typed
from job.checkpoint.callback import Checkpointer
from job.errors import CheckpointError, LeaseError, NewerFormatError, StorageError, StorageOutage
from job.features.callback import FeatureCache
from job.process.descendants import START, stat_fields
from job.process.periodic import Periodic
from job.storage.format_version import MALFORMED, Unversioned
from job.storage.json_files import read_limited

log = logging.getLogger(__name__)

FILE = "accounting.json"
SCALARS = "wall_time"
"""Group of the scalars, whose name TensorBoard sorts after those of training and validation."""

FORMAT = 2
"""Version of a record; 1 had no ``format`` field."""

RENEW_SECONDS = 10.0
"""Seconds between two writes of a small record."""

BYTES_PER_SECOND = 50.0
"""A larger record is written less often, so that a bucket that keeps superseded versions keeps 4.3 MB a day at most."""

Seconds = Annotated[float, Meta(ge=-1e11, le=1e11)]
Timestamp = Annotated[float, Meta(ge=0, le=1e11)]
"""Seconds since 1970, up to the year 5138: a time that datetime takes."""
Count = Annotated[int, Meta(ge=0, lt=2**53)]

_processes = itertools.count()
"""Counts the attempts within this process."""


class Attempt(msgspec.Struct, forbid_unknown_fields=True, rename={"recomputed": "lost"}):
    """One attempt: from the start of the process to its end, in seconds, on rank 0.

    Attributes:
        began: start of the process, in seconds since 1970.
        ended: last update of this record.
        world_size: number of processes.
        first_step: ``global_step`` that it resumed from.
        last_step: ``global_step`` that it reached.
        startup: from the start of the process to its first step, without ``features``.
        features: computing or fetching the features of the frozen backbone.
        step: forward, backward, communication and optimizer.
        data_wait: waiting for the next batch.
        validation: validating.
        checkpoint_stall: training blocked by a checkpoint.
        recomputed: the part of ``step`` that the next attempt had to repeat; ``lost`` in the file.
        format: version of this record.
    """

    began: Timestamp
    ended: Timestamp
    world_size: Annotated[int, Meta(ge=1, le=10**7)]
    first_step: Count = 0
    last_step: Count = 0
    startup: Seconds = 0.0
    features: Seconds = 0.0
    step: Seconds = 0.0
    data_wait: Seconds = 0.0
    validation: Seconds = 0.0
    checkpoint_stall: Seconds = 0.0
    recomputed: Seconds = 0.0
    format: Annotated[int, Meta(ge=1)] = 1


def read(run_dir: str) -> list[Attempt]:
    """The records of a run, in order; none, with a warning, where they cannot be read."""
    try:
        return _read(run_dir)
    except CheckpointError as error:
        log.warning("%s", error)
        return []


def _read(run_dir: str) -> list[Attempt]:
    """The records of a run, in order.

    Raises:
        CheckpointError: the file is damaged.
        NewerFormatError: a newer version of job wrote it.
    """
    uri = storage.join(run_dir, FILE)
    if not storage.exists(uri):
        return []
    try:
        content = read_limited(uri)
        newest = max((record.format for record in typed.from_json(content, list[Unversioned])), default=1)
        if newest > FORMAT:
            raise NewerFormatError(
                f"{uri} was written by a newer version of job: it has format {newest}, this version reads formats up "
                f"to {FORMAT}."
            )
        return typed.from_json(content, list[Attempt])
    except MALFORMED as error:
        raise CheckpointError(f"{uri} is damaged: {error}") from error


def totals(attempts: list[Attempt]) -> dict[str, float]:
    """Sums over all attempts, in seconds.

    ``wall`` is the time from the beginning of the first attempt to the end of the last; where attempts overlap (two at
    a time, or clocks that differ), it is at least the sum of their parts. ``goodput`` is the share of ``wall`` in steps
    that were not repeated and in the features that they train from; ``recomputed`` is the time of repeated steps.
    ``other`` is the remainder, mostly time between attempts. No figure is negative.
    """
    names = ("startup", "features", "step", "data_wait", "validation", "checkpoint_stall")
    sums = {name: sum(max(getattr(attempt, name), 0.0) for attempt in attempts) for name in names}
    recomputed = sum(max(attempt.recomputed, 0.0) for attempt in attempts)
    sums["recomputed"] = min(recomputed, sums["step"])
    sums["step"] -= sums["recomputed"]
    accounted = sum(sums.values())
    wall = max(max(attempt.ended for attempt in attempts) - min(attempt.began for attempt in attempts), accounted)
    goodput = (sums["step"] + sums["features"]) / wall if wall else 0.0
    return {"goodput": goodput, "wall": wall, **sums, "other": max(wall - accounted, 0.0)}


def shares(attempts: list[Attempt]) -> dict[str, float]:
    """Goodput, and each part of :func:`totals` as a share of ``wall``, from 0 to 1."""
    seconds = totals(attempts)
    goodput, wall = seconds.pop("goodput"), seconds.pop("wall")
    return {"goodput": goodput, **{name: value / wall if wall else 0.0 for name, value in seconds.items()}}


class Accounting(Callback):
    """Measures this attempt, and writes ``accounting.json`` on rank 0.

    Args:
        checkpointer: measures how long training was blocked by checkpoints.
        features: measures how long the features took.
        before_write: called immediately before each write; raises if this job may not write to run_dir.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        features: FeatureCache,
        before_write: Callable[[], None] = storage.unconditionally,
    ) -> None:
        self.checkpointer = checkpointer
        self.features = features
        self.before_write = before_write
        self.interval = RENEW_SECONDS
        self.earlier: list[Attempt] = []
        # The time before the first fit in a process is part of its first attempt.
        began = time.time() if next(_processes) else _process_began()
        self.attempt = Attempt(began=began, ended=time.time(), world_size=1, format=FORMAT)
        self._step_began: float | None = None
        self._validation_began = 0.0
        self._waited_in_startup = 0.0
        self._renewal: Periodic | None = None
        self._is_kept = True

    @property
    def attempts(self) -> list[Attempt]:
        """The records of all attempts, the current one last."""
        return [*self.earlier, self.attempt]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the records of earlier attempts, and compute how many steps of the last one are repeated."""
        self.attempt.world_size = trainer.world_size
        self.attempt.first_step = self.attempt.last_step = trainer.global_step
        if trainer.is_global_zero:
            self._run_dir = trainer.default_root_dir
            self.earlier = self._read_earlier()
            if self.earlier:
                last = self.earlier[-1]
                done, repeated = last.last_step - last.first_step, last.last_step - trainer.global_step
                last.recomputed = last.step * max(repeated, 0) / done if done > 0 else 0.0
            self.write()
            self._renewal = Periodic("accounting", lambda: self.interval, self.write)

    def _read_earlier(self) -> list[Attempt]:
        """Earlier records; a file that cannot be used is kept: of a newer version as it is, else beside a new one."""
        try:
            return _read(self._run_dir)
        except NewerFormatError as error:
            self._is_kept = False
            log.warning("%s It is left unchanged, without this attempt.", error)
        except CheckpointError as error:
            uri = storage.join(self._run_dir, FILE)
            kept = storage.join(self._run_dir, f"accounting.damaged-{int(time.time())}.json")
            with contextlib.suppress(CheckpointError):  # one that is too large to be read is no record of anything
                storage.write_bytes(kept, read_limited(uri), self.before_write)
            log.warning("%s It is kept as %s; accounting starts from zero.", error, kept)
        return []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """A step begins."""
        self._step_began = time.monotonic()
        if not self.attempt.startup:
            self.attempt.features = self.features.seconds
            self.attempt.startup = time.time() - self.attempt.began - self.attempt.features
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
        self.attempt.validation += time.monotonic() - self._validation_began

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the shares so far."""
        self._end_step(trainer)
        if trainer.is_global_zero:
            self._refresh()
            values = {f"{SCALARS}/{name}": value for name, value in shares(self.attempts).items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the record."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the record, unless it is the bucket that fails."""
        self._close(write=not isinstance(exception, StorageOutage))

    def write(self) -> None:
        """Renew the record; a bucket out of reach delays it, and one that lets nothing be replaced ends it."""
        self._refresh()
        if not self._is_kept:
            return
        uri = storage.join(self._run_dir, FILE)
        content = msgspec.json.format(msgspec.json.encode(self.attempts), indent=2)
        self.interval = max(RENEW_SECONDS, len(content) / BYTES_PER_SECOND)
        try:
            storage.write_bytes(uri, content, self.before_write)
        except (StorageOutage, LeaseError):
            pass
        except StorageError as error:
            self._is_kept = False
            log.warning("%s can no longer be updated; training continues: %s", uri, error)

    def _close(self, *, write: bool = True) -> None:
        if self._renewal is not None:
            self._renewal.stop()
            self._renewal = None
            if write:
                self.write()

    def _refresh(self) -> None:
        self.attempt.ended = time.time()
        self.attempt.checkpoint_stall = self.checkpointer.stall_seconds

    def _waited(self, trainer: pl.Trainer) -> float:
        loader = trainer.train_dataloader
        seconds: float = loader.wait_seconds if loader is not None else 0.0
        return seconds

    def _end_step(self, trainer: pl.Trainer) -> None:
        self.attempt.data_wait = self._waited(trainer) - self._waited_in_startup
        if self._step_began is not None:
            self.attempt.step += time.monotonic() - self._step_began
            self.attempt.last_step = trainer.global_step
            self._step_began = None


def _process_began() -> float:
    """When this process began, in seconds since the epoch (proc(5)); where that is not known, now."""
    if (fields := stat_fields(os.getpid())) is None:
        return time.time()
    ticks = int(fields[START])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
