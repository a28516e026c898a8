"""Progress of a Trainer: one line per epoch, and a bar below it on a terminal, or a log line every few seconds.

Metrics are looked at when they are shown. Lightning's ``prog_bar=True`` would fetch them at every step, so that an
accelerator and the host wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ProgressBar

from job.data.dataset import Batch
from job.process import logs
from job.process.progress import Display, Status, duration, short_number

SHOWN = ("loss", "accuracy", "mAP")
"""Metrics of each part that are shown, where a task has them, in this order."""
FETCH_SECONDS = 2.0
"""Between two looks at the metrics of a training step, for which the host waits for an accelerator."""


class LogPosition(Callback):
    """Gives JSON log records the epoch and the step, on every rank."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the position at which training begins."""
        logs.set_position(trainer.current_epoch + 1, trainer.global_step)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the position at which the epoch begins."""
        logs.set_position(trainer.current_epoch + 1, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Set the position after the batch."""
        logs.set_position(trainer.current_epoch + 1, trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Clear the position."""
        logs.clear_position()


@dataclass
class _EpochTimer:
    """Batches that this process has done, and the time that they took.

    Attributes:
        began: monotonic time of the beginning.
        batches: batches done.
        images: images in them, over all ranks.
        paused: seconds within that time in which something else was done.
        paused_at: monotonic time from which on something else is done.
    """

    began: float = field(default_factory=lambda: time.monotonic())
    batches: int = 0
    images: int = 0
    paused: float = 0.0
    paused_at: float | None = None

    def add(self, batch: Batch) -> None:
        self.batches += 1
        self.images += int(batch["global_size"])

    def pause(self) -> None:
        if self.paused_at is None:
            self.paused_at = time.monotonic()

    def resume(self) -> None:
        if self.paused_at is not None:
            self.paused += time.monotonic() - self.paused_at
            self.paused_at = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def seconds(self) -> float:
        """Seconds in which batches were done."""
        end = time.monotonic() if self.paused_at is None else self.paused_at
        return max(end - self.began - self.paused, 1e-9)

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.seconds if self.images else None


class TrainerProgress(ProgressBar):
    """Shows the progress of a fit, a validation or a test, on rank 0.

    The time left is that of all epochs to come: their batches as fast as those of the current epoch, and between them
    as much time as the last epoch took for its validation and checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self._display = Display(is_shown=False)
        self._epoch: _EpochTimer | None = None
        self._evaluation = _EpochTimer()
        self._batch_seconds: float | None = None
        self._extra_seconds = 0.0
        self._validated = False
        self._ended: int | None = None
        self._metrics: dict[str, float] = {}
        self._fetched_at = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin (Lightning has set the rank by now)."""
        super().setup(trainer, pl_module, stage)
        self._display = Display(is_shown=trainer.is_global_zero)

    def disable(self) -> None:
        """Show nothing (Lightning calls this on ranks other than 0, which show nothing as it is)."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the line of the epoch before, whose metrics are complete only now, and begin another one."""
        self._leave_epoch(trainer)
        self._epoch = _EpochTimer()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin an epoch that was resumed in its middle."""
        self._epoch = self._epoch or _EpochTimer()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch, and show the progress if it is time to."""
        assert self._epoch is not None
        self._epoch.add(batch)
        if self._display.is_due:
            self._display.show(self._training_status(trainer, self._epoch, batch_idx + 1))
        if trainer.is_last_batch:  # what follows, as a checkpoint or the projector, trains no images
            self._epoch.pause()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the epoch is complete."""
        self._ended = trainer.current_epoch

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the line of the last epoch, and remove the bar."""
        self._leave_epoch(trainer)
        self._display.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a validation."""
        self._evaluation = _EpochTimer()
        if self._epoch is not None:
            self._epoch.pause()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a test."""
        self._evaluation = _EpochTimer()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch, and show the progress if it is time to."""
        self._count_evaluated(trainer, batch, "validation", trainer.num_val_batches)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch, and show the progress if it is time to."""
        self._count_evaluated(trainer, batch, "test", trainer.num_test_batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a line for a validation within an epoch; at the end of one, its metrics are in the epoch's line."""
        if trainer.state.fn != "fit":
            self._display.close()
            return
        self._validated = True
        if not trainer.is_last_batch:
            if self._epoch is not None:
                self._epoch.resume()
            metrics = _values(trainer, "val/")
            line = "  ".join([_epoch_name(trainer, trainer.current_epoch), _step(trainer), *_words(metrics)])
            self._display.leave(line, {**_place(trainer, trainer.current_epoch), **metrics})

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._display.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the bar."""
        self._display.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the bar."""
        self._display.close()

    def _count_evaluated(
        self, trainer: pl.Trainer, batch: Batch, task: str, batches: list[int | float] | int | float
    ) -> None:
        self._evaluation.add(batch)
        if self._display.is_due:
            self._display.show(self._evaluation_status(trainer, task, _total(batches)))

    def _training_status(self, trainer: pl.Trainer, epoch: _EpochTimer, batches: int) -> Status:
        total = int(trainer.num_training_batches)
        return Status(
            _epoch_name(trainer, trainer.current_epoch),
            batches,
            total,
            "batches",
            facts=self._training_metrics(trainer),
            rate=epoch.images_per_second,
            rate_unit="images",
            seconds_left=self._seconds_left(trainer, total - batches, trainer.current_epoch),
        )

    def _training_metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        if time.monotonic() - self._fetched_at >= FETCH_SECONDS:
            self._metrics, self._fetched_at = _values(trainer, "train/"), time.monotonic()
        return self._metrics

    def _evaluation_status(self, trainer: pl.Trainer, task: str, total: int) -> Status:
        evaluation = self._evaluation
        each = evaluation.seconds / evaluation.batches
        left: float | None = each * (total - evaluation.batches)
        if trainer.state.fn == "fit":
            if self._batch_seconds is None:  # no epoch has ended
                self._extra_seconds = each * total
            task = f"{_epoch_name(trainer, trainer.current_epoch)}  {task}"
            batches = int(trainer.num_training_batches) - self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            rest = self._seconds_left(trainer, batches, trainer.current_epoch, validating=True)
            left = None if rest is None else left + rest  # type: ignore[operator]
        return Status(
            task,
            evaluation.batches,
            total,
            "batches",
            rate=evaluation.images_per_second,
            rate_unit="images",
            seconds_left=left,
        )

    def _seconds_left(self, trainer: pl.Trainer, batches: int, epoch: int, *, validating: bool = False) -> float | None:
        """Estimate of the time until the end of the run; None where its length is not known.

        Args:
            batches: batches of this epoch that are left.
            epoch: the current epoch, from 0.
            validating: the time until the end of a validation that runs is added by the caller.
        """
        assert self._epoch is not None
        total, epochs = int(trainer.num_training_batches), 0
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            epochs = max(trainer.max_epochs - epoch - 1, 0)
            batches += epochs * total
            if trainer.max_steps >= 0:
                steps = max(trainer.max_steps - trainer.global_step, 0)
                batches = min(batches, steps * trainer.accumulate_grad_batches)
        elif trainer.max_steps >= 0:
            batches = max(trainer.max_steps - trainer.global_step, 0) * trainer.accumulate_grad_batches
        else:
            return None
        each = self._epoch.seconds / self._epoch.batches if self._epoch.batches else None
        if self._epoch.batches < 2 and self._batch_seconds is not None:
            each = self._batch_seconds  # the first batch waits for the loader
        if each is None:
            return None
        return batches * each + (epochs + (not validating)) * self._extra_seconds

    def _leave_epoch(self, trainer: pl.Trainer) -> None:
        """Leave the line of the epoch that has ended, if one has, and keep what it tells of those to come."""
        number, epoch = self._ended, self._epoch
        if number is None or epoch is None:
            return
        self._batch_seconds = epoch.seconds / max(epoch.batches, 1)
        self._extra_seconds = epoch.elapsed - epoch.seconds
        metrics = {**_epoch_values(trainer), **(_values(trainer, "val/") if self._validated else {})}
        parts = [_epoch_name(trainer, number), _step(trainer), *_words(metrics)]
        facts: dict[str, object] = {**_place(trainer, number), **metrics, "seconds": round(epoch.elapsed, 3)}
        if epoch.images_per_second is not None:
            parts.append(f"{short_number(epoch.images_per_second)} images/s")
            facts["images_per_second"] = round(epoch.images_per_second, 3)
        parts.append(f"took {duration(epoch.elapsed)}")
        left = self._seconds_left(trainer, 0, number, validating=True)
        if left and not trainer.should_stop:
            parts.append(f"{duration(left)} left")
            facts["seconds_left"] = round(left, 1)
        self._display.leave("  ".join(parts), facts)
        self._epoch, self._ended, self._validated = None, None, False


class TuningProgress(TrainerProgress):
    """Shows the progress of a fit that is a number of steps, on rank 0."""

    def _training_status(self, trainer: pl.Trainer, epoch: _EpochTimer, batches: int) -> Status:
        return Status(
            "learning rates",
            trainer.global_step,
            trainer.max_steps,
            "steps",
            facts=self._training_metrics(trainer),
            rate=epoch.images_per_second,
            rate_unit="images",
            seconds_left=self._seconds_left(trainer, 0, trainer.current_epoch),
        )

    def _leave_epoch(self, trainer: pl.Trainer) -> None:
        """Leave nothing: an epoch has no meaning here."""


def _total(batches: list[int | float] | int | float) -> int:
    return int(sum(batches) if isinstance(batches, list) else batches)


def _epoch_name(trainer: pl.Trainer, epoch: int) -> str:
    limited = trainer.max_epochs is not None and trainer.max_epochs >= 0
    return f"epoch {epoch + 1}/{trainer.max_epochs}" if limited else f"epoch {epoch + 1}"


def _step(trainer: pl.Trainer) -> str:
    return f"step {trainer.global_step}"


def _place(trainer: pl.Trainer, epoch: int) -> dict[str, object]:
    return {"epoch": epoch + 1, "epochs": trainer.max_epochs, "global_step": trainer.global_step}


def _words(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in metrics.items()]


def _values(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    """The metrics to show, fetched from their device."""
    metrics = trainer.callback_metrics
    names = (f"{prefix}{name}" for name in SHOWN)
    return {name: float(metrics[name]) for name in names if name in metrics}


def _epoch_values(trainer: pl.Trainer) -> dict[str, float]:
    """Those of training, over the epoch that has ended: ``train/loss`` itself is the loss of its last step."""
    values, mean = _values(trainer, "train/"), trainer.callback_metrics.get("train/loss_epoch")
    return values if mean is None else {**values, "train/loss": float(mean)}
