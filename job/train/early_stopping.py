"""Early stopping by the metric that ranks checkpoints: the option ``--early_stopping``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import callbacks as library

from job.checkpoint.settings import CheckpointSettings
from job.config.trainer_options import listed
from job.errors import ConfigError

log = logging.getLogger(__name__)


class EarlyStopping(library.EarlyStopping):
    """Lightning's EarlyStopping, which also logs why it ends the training."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count a validation without improvement, and end the training after ``patience`` of them."""
        before = self.wait_count
        super().on_validation_end(trainer, pl_module)
        if not before < self.wait_count == self.patience:
            return
        epoch = trainer.current_epoch + 1
        log.info(
            "early stopping after epoch %d: %s has not improved on %.4g in %d validation(s)",
            epoch,
            self.monitor,
            self.best_score,
            self.patience,
        )
        ahead = [milestone for milestone in pl_module.hparams.get("milestones", []) if milestone >= epoch]
        if ahead:
            log.warning(
                "the run ends before epoch %d, in which more layers would be unfrozen. Choose earlier "
                "--model.milestones, or a larger --early_stopping.",
                ahead[0] + 1,
            )


def make_early_stopping(patience: int, ranking: CheckpointSettings) -> EarlyStopping:
    """The callback that ends training after ``patience`` validations without a better checkpoint.

    Args:
        patience: validations in a row without improvement.
        ranking: names the metric, and says which direction is better.
    """
    return EarlyStopping(
        ranking.metric,
        patience=patience,
        mode=ranking.ranking_mode,
        strict=False,  # a metric that is undefined is named by the checkpoint, which ranks by it
        check_on_train_epoch_end=False,
    )


def require_possible(patience: int, trainer_settings: Mapping[str, Any]) -> None:
    """Check that early stopping has a validation to go by and is not configured twice.

    Raises:
        ConfigError: the message names the option.
    """
    if patience < 0:
        raise ConfigError(f"--early_stopping must be at least 0 (0 disables it), not {patience}.")
    if not patience:
        return
    if any(isinstance(each, library.EarlyStopping) for each in listed(trainer_settings.get("callbacks"))):
        raise ConfigError(
            "--early_stopping and an EarlyStopping in --trainer.callbacks are both given. Leave one of them out."
        )
    if trainer_settings.get("limit_val_batches") in (0, 0.0):
        raise ConfigError("--early_stopping needs validations, and --trainer.limit_val_batches is 0. Leave one out.")
