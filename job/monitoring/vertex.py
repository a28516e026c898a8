"""Vertex AI metric reporter: hands a trial's metric to the hyperparameter tuner."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class VertexMetricReporter(Callback):
    """Appends the monitored metric to the tuner's file after each validation, on rank 0 of a trial.

    The file's place and its JSON lines are those of Google's ``cloudml-hypertune`` 0.1.0.dev6.

    Args:
        monitor: logged metric to report. Its name there is ``metric``: a "/" is no part of the tuner's names.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.trial = os.environ.get("CLOUD_ML_TRIAL_ID", "")
        self.file = Path(os.environ.get("CLOUD_ML_HP_METRIC_FILE", "/tmp/hypertune/output.metrics"))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report."""
        if not self.trial or not trainer.is_global_zero or self.monitor not in trainer.callback_metrics:
            return
        record = {
            "timestamp": time.time(),
            "trial": self.trial,
            "metric": str(float(trainer.callback_metrics[self.monitor])),
            "global_step": str(trainer.global_step),
            "checkpoint_path": "",
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
