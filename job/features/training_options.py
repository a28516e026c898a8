"""Features by the options of training: device and precision of the Trainer, network of the model, folders of the data.

Used by the commands that compute features and train no network.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
import torch

from job import storage
from job.cluster import ranks
from job.data.datamodule import ImageDataModule
from job.errors import ConfigError
from job.features.extract import ExtractionSettings
from job.features.store import FOLDER
from job.model.classifier import Classifier, build_classifier
from job.model.config import ModelConfig
from job.model.loading import read_pretrained
from job.predict.precision import Precision

PRECISIONS: dict[str, Precision] = {"bf16-mixed": "bf16", "32-true": "fp32", "32": "fp32"}
"""Precision of features, by that of the Trainer."""


def feature_precision(trainer: pl.Trainer, command: str) -> Precision:
    """Precision of features, for the Trainer's device and precision.

    Args:
        trainer: chooses device and precision.
        command: name of the command, for messages.

    Raises:
        ConfigError: features are not computed so.
    """
    if trainer.strategy.root_device.type == "xla":
        raise ConfigError(f"{command} does not work on XLA. Use a CPU or a GPU: --trainer.accelerator=cpu.")
    precision = PRECISIONS.get(str(trainer.precision))
    if precision is None:
        raise ConfigError(
            f"{command} computes features at bf16-mixed or 32-true, not {trainer.precision}. Change "
            "--trainer.precision."
        )
    return precision


def extraction_settings(data: ImageDataModule, run_dir: str, precision: Precision) -> ExtractionSettings:
    """Where and how features are computed, so that ``fit`` in the same run_dir finds them.

    Args:
        data: its cache and loader settings are used.
        run_dir: folder of the run.
        precision: of the features.
    """
    return ExtractionSettings(
        cache_dir=data.cache_dir,
        uri=storage.join(run_dir, FOLDER),
        batch_size=max(data.global_batch_size // ranks.world_size(), 1),
        num_workers=data.num_workers,
        precision=precision,
    )


def frozen_network(config: ModelConfig, classes: Sequence[str], image_size: int, device: torch.device) -> Classifier:
    """The network of a model before its training, in eval mode.

    Args:
        config: of the model.
        classes: names of the classes.
        image_size: height and width of images, in pixels.
        device: that computes.

    Raises:
        ConfigError: there is no such backbone.
        WeightsError: the weights cannot be used.
    """
    net = build_classifier(
        config,
        read_pretrained(config.weights),
        classes=classes,
        image_size=image_size,
        device_type=device.type,
    )
    return net.to(device).eval()
