"""The best trial: trained on all training images, validated once, and written as a checkpoint and as a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import msgspec
import numpy as np
import torch
import yaml

from job import checkpoint, storage
from job.checkpoint.confusion import ConfusionMatrix
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.manifest import FORMAT, kept_metrics
from job.checkpoint.ranking import mode_of
from job.checkpoint.state import (
    CALIBRATOR_KEY,
    CLASSIFIER_KEY,
    COMPATIBILITY_KEY,
    CONFUSION_KEY,
    FORMAT_KEY,
    MANIFEST_KEY,
    PRECISION_KEY,
)
from job.config.run_config import FILE as CONFIG_FILE
from job.data.datamodule import ImageDataModule
from job.data.dataset import Batch
from job.model.classifier import Classifier
from job.model.config import ModelConfig
from job.model.evaluation import Evaluation
from job.model.head import cpu_threads
from job.model.metrics import TaskMetrics
from job.model.spec import PREFIX
from job.model.tasks import TASKS
from job.resilience.lease import Lease
from job.sweep.crossvalidation import head_of, threads_for
from job.sweep.features import PartFeatures
from job.sweep.heads import ALL_SAMPLES, EVALUATION_ROWS, HeadBatch, Plan
from job.sweep.trials import Trial

RECIPE_FILE = "recipe.yaml"
_FINE_TUNING = """\
# The best head of a sweep, for: python -m job fit RUN_DIR --config {uri}
# To go on from the trained head, and to train the backbone from epoch 2 on, add:
#   --init_from {folder} --model.milestones='[1,1]' --model.backbone_lr_factor=0.1
"""


def config_of(trial: Trial, base: ModelConfig) -> ModelConfig:
    """Hyperparameters of the model with the settings of a trial; those of optimizer and schedule are in the recipe."""
    return replace(
        base,
        hidden=list(trial.hidden),
        dropout=trial.dropout,
        label_smoothing=trial.label_smoothing,
        class_weights=trial.class_weights,
    )


def train_winner(
    trial: Trial,
    net: Classifier,
    part: PartFeatures,
    plan: Plan,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Train the head of ``net`` on all training images, from the initial weights that a fit of the recipe has.

    Args:
        trial: its settings.
        net: the network.
        part: the training part.
        plan: length and order of the training.
        device: that computes.
        tick: called after each step.
    """
    batch = HeadBatch([head_of(trial, ALL_SAMPLES)], net.head, trial.dropout, plan, device)
    with cpu_threads(threads_for(batch)):
        batch.train(part.rows, part.targets, None, after_step=tick)
    batch.copy_to(net.head, 0)


@torch.no_grad()
def validate_winner(
    net: Classifier, config: ModelConfig, data: ImageDataModule, part: PartFeatures
) -> tuple[Evaluation, TaskMetrics]:
    """Evaluate a network on the features of the validation part, by the metrics of ``validate``."""
    task = TASKS[config.task](config, len(data.classes), lambda: data.parts["train"])
    index, rows, device = data.parts["val"], part.rows, net.mean.device
    metrics = task.make_metrics(data.classes, samples=len(index), synchronise=False)
    metrics.fits_calibrator = True
    net.eval()
    for start in range(0, len(index), EVALUATION_ROWS):
        samples = np.arange(start, min(start + EVALUATION_ROWS, len(index)))
        chosen = torch.from_numpy(samples)
        batch = Batch(
            label=torch.from_numpy(index.labels_of(samples)).to(device),
            mask=part.targets.valid[chosen.to(device)],
            sample=chosen,
            global_size=len(samples),
            bad=[],
            error=None,
        )
        if index.has_several_labels:
            batch["labels"] = torch.from_numpy(index.multi_hot_of(samples)).to(device)
        logits = net.head(rows.rows(samples, None).to(device))
        metrics.update_logits(**task.evaluate(batch, logits))
    metrics.choose_thresholds()
    metrics.fit_calibrator()
    return metrics.compute(), metrics


@dataclass(frozen=True)
class Winner:
    """A trained and validated network.

    Attributes:
        net: the network.
        config: its hyperparameters.
        evaluation: on the validation part.
        metrics: that evaluated it.
        plan: length of its training.
        steps: optimizer steps.
    """

    net: Classifier
    config: ModelConfig
    evaluation: Evaluation
    metrics: TaskMetrics
    plan: Plan
    steps: int


def write_checkpoint(winner: Winner, data: ImageDataModule, precision: str, folder: str, lease: Lease) -> str:
    """Write a checkpoint below ``folder``, as of a run_dir, and remove those of earlier sweeps; returns its file name.

    Raises:
        StorageError: it cannot be written.
    """
    monitor = TASKS[winner.config.task].monitor
    metrics = {f"val/{name}": value for name, value in winner.evaluation.metrics.items()}
    state = {f"{PREFIX}{name}": value for name, value in winner.net.state_dict().items()}
    saved = {
        "epoch": winner.plan.epochs,
        "global_step": winner.steps,
        "pytorch-lightning_version": version("pytorch-lightning"),
        "state_dict": state,
        "hyper_parameters": winner.config.plain_values(),
        CLASSIFIER_KEY: {**winner.net.spec(), **winner.metrics.description(), "resize": data.resize},
        PRECISION_KEY: precision,
        FORMAT_KEY: FORMAT,
        COMPATIBILITY_KEY: {},
        MANIFEST_KEY: {
            "epoch": winner.plan.epochs,
            "batch": 0,
            "global_step": winner.steps,
            "monitor": monitor,
            "mode": mode_of(monitor, None),
            "metrics": kept_metrics(metrics, monitor),
            "validation": data.parts["val"].fingerprint(),
        },
        CONFUSION_KEY: ConfusionMatrix(winner.evaluation.confusion, len(data.classes)),
    }
    fit = winner.evaluation.calibrator_fit
    if fit is not None and fit.calibrator is not None:
        saved[CALIBRATOR_KEY] = msgspec.to_builtins(fit.calibrator)
    name = f"epoch={winner.plan.epochs:03d}-step={winner.steps:08d}{checkpoint.SUFFIX}"
    earlier = {manifest.file: manifest.sha256 for manifest in checkpoint.manifests(folder)}
    io = BackgroundCheckpointIO(before_write=lease.require_held)
    io.save_checkpoint(saved, storage.join(folder, checkpoint.FOLDER, name))
    io.wait()
    written = [each for each in checkpoint.manifests(folder) if earlier.get(each.file) != each.sha256]
    file = written[-1].file if written else name
    for other in earlier:
        if other != file:
            lease.require_held()
            checkpoint.remove(storage.join(folder, checkpoint.FOLDER, other))
    return file


def write_recipe(
    trial: Trial, config: ModelConfig, plan: Plan, options: Mapping[str, Any], folder: str, lease: Lease
) -> str:
    """Write the options of a fit of the best head, as a recipe and as the configuration of ``folder``.

    Args:
        trial: the best one.
        config: its hyperparameters.
        plan: length of the training.
        options: the options of the sweep that differ from their defaults, by section; without credentials.
        folder: of the results.
        lease: of ``folder``.

    Returns:
        The URI of the recipe.
    """
    model: dict[str, Any] = {
        **options.get("model", {}),
        "backbone": config.backbone,
        "weights": config.plain_values()["weights"],
        "hidden": list(trial.hidden),
        "dropout": trial.dropout,
        "label_smoothing": trial.label_smoothing,
        "class_weights": trial.class_weights,
        "milestones": [plan.epochs],
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": trial.lr, "weight_decay": trial.weight_decay},
        },
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "init_args": {"T_max": plan.epochs},
        },
    }
    recipe = {
        "seed_everything": plan.seed,
        "data": {**options.get("data", {}), "global_batch_size": plan.batch_size},
        "model": model,
        "trainer": {**options.get("trainer", {}), "max_epochs": plan.epochs},
    }
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    uri = storage.join(folder, RECIPE_FILE)
    header = _FINE_TUNING.format(uri=_one_line(uri), folder=_one_line(folder))
    storage.write_bytes(uri, (header + text).encode(), lease.require_held)
    storage.write_bytes(storage.join(folder, CONFIG_FILE), text.encode(), lease.require_held)
    return uri


def _one_line(uri: str) -> str:
    return " ".join(uri.split())
