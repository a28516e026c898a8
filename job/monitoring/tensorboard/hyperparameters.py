"""Hyperparameters and best metrics of a run, by which TensorBoard's HPARAMS tab compares runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import Callback

from job import checkpoint
from job.checkpoint.manifest import Manifest
from job.checkpoint.ranking import mode_of
from job.checkpoint.settings import CheckpointSettings
from job.errors import StorageError
from job.monitoring.tensorboard.hparams_summary import Value, plain_values, session_end
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger

log = logging.getLogger(__name__)

MODEL_LEFT_OUT = frozenset(["seed", "mean", "std", "compile_backbone", "nonfinite", "max_skipped_steps"])
"""Options of the model that are no choice of training, or are given elsewhere."""
NAMES = {
    "data.root": "data",
    "data.train": "data",
    "data.sampling": "sampling",
    "data.global_batch_size": "batch_size",
    "data.image_size": "image_size",
    "data.resize": "resize",
    "data.augment": "augment",
    "data.augment_views": "augment_views",
    "trainer.max_epochs": "epochs",
    "trainer.accumulate_grad_batches": "accumulate_grad_batches",
    "trainer.gradient_clip_val": "gradient_clip",
    "seed_everything": "seed",
}
"""Hyperparameter by option, beside those of the model."""
BEST = "best"
"""Group of the scalars. The tab shows the first five of all scalars, in the order of their names."""


def hyperparameters(config: str) -> dict[str, Value]:
    """The options of a resolved configuration that decide the result, under short names.

    Options without a value are left out; a class is text, such as ``AdamW(weight_decay=0.05)``.

    Args:
        config: the configuration, as YAML.
    """
    tree = yaml.safe_load(config) or {}
    model = {name: value for name, value in (tree.get("model") or {}).items() if name not in MODEL_LEFT_OUT}
    options = {name: _option(tree, option) for option, name in NAMES.items() if _option(tree, option) is not None}
    return plain_values({**model, **options})


class HyperparameterWriter(Callback):
    """Writes the hyperparameters at the start, and the metrics of the best validation so far as ``best/…``.

    Args:
        config: the resolved configuration, as YAML.
        settings: says which metric ranks checkpoints.
        logger: of TensorBoard.
    """

    def __init__(self, config: str, settings: CheckpointSettings, logger: BucketTensorBoardLogger) -> None:
        self.config = config
        self.monitor, self.mode = settings.metric, mode_of(settings.metric, settings.mode)
        self.logger = logger
        self._has_started = False
        self._best: float | None = None
        self._logged: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the hyperparameters."""
        if not trainer.is_global_zero:
            return
        self._has_started = True
        values = {
            **hyperparameters(self.config),
            "precision": str(trainer.precision),
            "world_size": trainer.world_size,
        }
        for logger in trainer.loggers:
            logger.log_hyperparams(dict(values))
        best = _best_checkpoint(trainer.default_root_dir)
        self._best = None if best is None else best.measured(self.monitor)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the metrics, if the validation is the best so far."""
        if not trainer.is_global_zero or trainer.state.fn != "fit" or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(value) and (self._best is None or sign * value >= sign * self._best):
            self._best = value
            self._log(trainer, {name: float(metric) for name, metric in trainer.callback_metrics.items()})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the metrics of the best checkpoint, which may be another one than the best validation, and the end."""
        if not self._has_started:  # a run that was found finished
            return
        if (best := _best_checkpoint(trainer.default_root_dir)) is not None:
            self._log(trainer, best.metrics)
        self.logger.add_summary(session_end(), trainer.global_step)

    def _log(self, trainer: pl.Trainer, metrics: Mapping[str, float | None]) -> None:
        best = {
            f"{BEST}/{name.removeprefix('val/')}": value
            for name, value in metrics.items()
            if name.startswith("val/") and name.count("/") == 1 and value is not None and math.isfinite(value)
        }
        if best != self._logged:
            self._logged = best
            for logger in trainer.loggers:
                logger.log_metrics(best, step=trainer.global_step - 1)


def _best_checkpoint(run_dir: str) -> Manifest | None:
    """The best checkpoint so far; None, with a warning, where the bucket does not say: the run goes on without."""
    try:
        committed = checkpoint.ranked(checkpoint.manifests(run_dir))
    except StorageError as error:
        log.warning("TensorBoard's HPARAMS tab lacks the metrics of the best checkpoint: %s", error)
        return None
    return committed[0] if committed else None


def _option(tree: Mapping[str, Any], option: str) -> Any:
    value: Any = tree
    for name in option.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
