"""The Lightning Trainer for this machine: processes, progress, checkpoints through the bucket."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, RichProgressBar

from job.logging.progress import PlainProgress
from job.logging.tensorboard import BucketTensorBoardLogger
from job.train.checkpoint import VerifiedCheckpointIO
from job.train.report import Report


def build_trainer(
    settings: dict[str, Any], callbacks: list[Callback], run_dir: str | None, logger: BucketTensorBoardLogger | None
) -> pl.Trainer:
    """A Trainer from the user's ``settings`` (Trainer's own arguments) plus what this job always adds."""
    settings = {**settings, **_processes(settings)}
    chosen = settings.pop("callbacks", None) or []
    added: list[Callback] = [*callbacks]
    if settings.pop("enable_progress_bar", None) is not False:
        added.append(RichProgressBar() if sys.stderr.isatty() else PlainProgress())
    if logger is not None:
        added += [LearningRateMonitor(logging_interval="step"), Report()]
    plugins = settings.pop("plugins", None) or []
    return pl.Trainer(
        **{
            **settings,
            "logger": logger or False,
            "default_root_dir": run_dir,
            "callbacks": [*(chosen if isinstance(chosen, list) else [chosen]), *added],
            "plugins": [*(plugins if isinstance(plugins, list) else [plugins]), VerifiedCheckpointIO()],
            # The data module itself gives each rank its share of every global batch.
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        }
    )


def _processes(settings: dict[str, Any]) -> dict[str, Any]:
    """Under torchrun, use the processes it started; else what the user said."""
    if not TorchElasticEnvironment.detect():
        return {}
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    strategy = settings.get("strategy") or "auto"
    if strategy == "auto" and world > 1:
        strategy = "ddp"
    return {"devices": local, "num_nodes": world // local, "strategy": strategy}
