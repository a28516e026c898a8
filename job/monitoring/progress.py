"""Progress: Lightning's rich bar on a terminal, one plain line now and then in a log file.

Both look at a value when they show it. Lightning's ``prog_bar=True`` would fetch it at every step, so that an
accelerator and the host wait for each other.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar

log = logging.getLogger(__name__)

SHOWN = ("train/loss", "val/loss", "val/accuracy", "val/mAP")
FETCH_SECONDS = 2.0
"""Between two looks of the bar, which is drawn at every step."""


class TerminalProgress(RichProgressBar):
    """A bar for each epoch, with the latest loss."""

    def __init__(self) -> None:
        super().__init__()
        self._metrics: dict[str, float] = {}
        self._fetched = 0.0

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Metrics beside the bar."""
        if time.monotonic() - self._fetched >= FETCH_SECONDS:
            self._metrics, self._fetched = _values(trainer), time.monotonic()
        return dict(self._metrics)


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
        """Log the position and the loss, every ``seconds``."""
        now = time.monotonic()
        if self.enabled and now - self._last >= self.seconds:
            self._last = now
            done, total = batch_idx + 1, self.total_train_batches
            log.info("epoch %d  batch %d/%s  %s", trainer.current_epoch, done, total, _numbers(trainer, "train/"))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the validation metrics."""
        if self.enabled and trainer.state.fn == "fit":
            log.info("epoch %d  %s", trainer.current_epoch, _numbers(trainer, "val/"))


def _values(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(trainer.callback_metrics[name]) for name in SHOWN if name in trainer.callback_metrics}


def _numbers(trainer: pl.Trainer, prefix: str) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in _values(trainer).items() if name.startswith(prefix))
