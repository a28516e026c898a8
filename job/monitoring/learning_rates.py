"""Learning rates of the parameter groups that train, by name."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job.data.dataset import Batch
from job.lightning_internals import logs_are_due
from job.model.module import training_groups
from job.model.steps import completes_step


class LearningRates(Callback):
    """Logs the learning rates that a step uses as ``lr/…``, where its logs are due.

    Lightning's LearningRateMonitor has a curve for each parameter group, frozen ones included.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Log the rates."""
        if logs_are_due(trainer) and completes_step(trainer, batch_idx):
            rates = {f"lr/{name}": rate for name, rate in learning_rates(trainer).items()}
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=trainer.global_step)


def learning_rates(trainer: pl.Trainer) -> dict[str, float]:
    """Learning rate by name of parameter group, of the groups that train now.

    Groups with and without weight decay have one name, and one rate.
    """
    return {name: float(group["lr"]) for name, group in training_groups(trainer)}
