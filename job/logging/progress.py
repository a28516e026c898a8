"""Progress for a log file: one plain line now and then (a terminal gets Lightning's rich bar)."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar

log = logging.getLogger(__name__)


class PlainProgress(ProgressBar):
    """One line every ``seconds``, and one at the end of each validation, on rank 0."""

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.enabled = True
        self._last = time.monotonic()

    def disable(self) -> None:
        """Silence it (Lightning calls this on ranks other than 0)."""
        self.enabled = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where training stands, when it is time."""
        now = time.monotonic()
        if self.enabled and now - self._last >= self.seconds:
            self._last = now
            done, total = batch_idx + 1, self.total_train_batches
            log.info("epoch %d  batch %d/%s  %s", trainer.current_epoch, done, total, _numbers(trainer, "train/"))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what validation found."""
        if self.enabled and trainer.state.fn == "fit":
            log.info("epoch %d  %s", trainer.current_epoch, _numbers(trainer, "val/"))


def _numbers(trainer: pl.Trainer, prefix: str) -> str:
    shown = {k: v for k, v in trainer.progress_bar_metrics.items() if k.startswith(prefix)}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
