"""Records each validation of a fit, with the training before it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job.checkpoint.state import HISTORY_KEY
from job.data.dataset import Batch
from job.errors import CheckpointError
from job.monitoring.accounting import Accounting
from job.monitoring.history import ValidationRecord, decode, encode, thinned, until_step
from job.monitoring.learning_rates import learning_rates

log = logging.getLogger(__name__)

PREFIXES = ("train/", "val/")


class ValidationRecorder(Callback):
    """Measures the throughput of training, and keeps a :class:`ValidationRecord` per validation, on rank 0.

    Args:
        accounting: measures where the time goes.
        earlier: returns the records that the report of an earlier attempt has, for a checkpoint without them.

    Attributes:
        records: validations of the run so far, in order.
        train_seconds: time of the training epochs that this attempt has completed, without validations.
        train_images: images trained on in them.
    """

    def __init__(self, accounting: Accounting, earlier: Callable[[], Sequence[ValidationRecord]] = lambda: ()) -> None:
        self.accounting = accounting
        self.earlier = earlier
        self.records: list[ValidationRecord] = []
        self._loaded: list[ValidationRecord] | None = None
        self.train_seconds = 0.0
        self.train_images = 0
        self._clock: float | None = None
        self._epoch_seconds, self._epoch_images = 0.0, 0
        self._seconds, self._images, self._data_wait = 0.0, 0, 0.0  # since the last validation

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the records up to the step that training continues from."""
        if trainer.is_global_zero:
            self.records = until_step(self.earlier() if self._loaded is None else self._loaded, trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the records, which a kill would otherwise lose with the report that is not written yet."""
        if trainer.is_global_zero:
            checkpoint[HISTORY_KEY] = encode(self.records)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the records; a checkpoint of an earlier version has none."""
        if trainer.is_global_zero and HISTORY_KEY in checkpoint:
            try:
                self._loaded = decode(checkpoint[HISTORY_KEY])
            except CheckpointError as error:
                log.warning("%s; it is taken from the report", error)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the epoch."""
        self._clock = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start the clock where an epoch was resumed in its middle."""
        if self._clock is None:
            self._clock = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the images of the batch, and stop the clock at the epoch's last one."""
        self._epoch_images += int(batch["global_size"])
        self._images += int(batch["global_size"])
        if trainer.is_last_batch:
            self._stop_clock()
            self.train_seconds += self._epoch_seconds
            self.train_images += self._epoch_images
            rate = self._epoch_images / self._epoch_seconds
            self._epoch_seconds, self._epoch_images = 0.0, 0
            for logger in trainer.loggers:
                logger.log_metrics({"train/images_per_second": rate}, step=trainer.global_step - 1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock for a validation within the epoch."""
        self._stop_clock()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the validation, and go on with the clock if it was within the epoch."""
        if trainer.is_global_zero and trainer.state.fn == "fit":
            record = self._record(trainer)
            self.records = thinned([*until_step(self.records, record.global_step - 1), record])
        self._seconds, self._images = 0.0, 0
        self._data_wait = self.accounting.attempt.data_wait
        if not trainer.is_last_batch:
            self._clock = time.monotonic()

    def _record(self, trainer: pl.Trainer) -> ValidationRecord:
        trained = self._images > 0 and self._seconds > 0
        waited = self.accounting.attempt.data_wait - self._data_wait
        return ValidationRecord(
            epoch=trainer.current_epoch + 1,
            global_step=trainer.global_step,
            metrics=_metrics(trainer),
            lr=learning_rates(trainer),
            images_per_second=self._images / self._seconds if trained else None,
            data_wait=min(max(waited / self._seconds, 0.0), 1.0) if trained else None,
            seconds=time.time() - self.accounting.attempts[0].began,
        )

    def _stop_clock(self) -> None:
        if self._clock is not None:
            seconds = time.monotonic() - self._clock
            self._epoch_seconds += seconds
            self._seconds += seconds
            self._clock = None


def _metrics(trainer: pl.Trainer) -> dict[str, float | None]:
    """Metrics of training and validation, without those of single classes or parameter groups.

    Within an epoch its means are left out: they are those of the epoch before.
    """
    values = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(PREFIXES) and name.count("/") == 1 and (trainer.is_last_batch or not name.endswith("_epoch"))
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
