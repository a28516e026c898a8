"""Overhead of monitoring, and bytes of TensorBoard events.

Run it by ``make benchmark-monitoring``. Each fit switches monitoring off and on again every ten steps, and from one
validation to the next, so that both are measured in one run, under the same load. "On" is the run as the package
assembles it. In "off" no hook of a monitoring callback is called, nothing is logged, and validation measures loss,
accuracy and the confusion matrix alone.
"""

from __future__ import annotations

import argparse
import functools
import io
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from job.checkpoint.settings import CheckpointSettings
from job.cli.versions import library_versions
from job.data.datamodule import ImageDataModule
from job.features.callback import FeatureSettings
from job.model.config import ModelConfig
from job.model.evaluation import Evaluation
from job.model.task import ClassificationTask
from job.train.fit import FitSettings, fit

METRICS = "metrics"
LOG_EVERY = 10
PIXELS = 224
BATCH = 8
STEPS = 40
"""Steps per epoch from images."""
IMAGES = 200
"""Images of a validation."""
NEVER = 10**6
STEP_HOOKS = (
    *("on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_before_zero_grad"),
)
VALIDATION_HOOKS = (
    *("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end"),
    *("on_validation_epoch_end", "on_validation_end"),
)


class BareMetrics:
    """Loss, accuracy and the confusion matrix: what checkpoints need, as :class:`~job.model.metrics.TaskMetrics`."""

    thresholds = None
    calibrator = None

    def __init__(self, classes: int) -> None:
        self.loss = MeanMetric(nan_strategy="disable")
        self.confusion = MulticlassConfusionMatrix(classes)

    def update_logits(self, losses: Tensor, logits: Tensor, labels: Tensor, mask: Tensor, **other: Any) -> None:
        """Add a batch."""
        self.loss.update(losses[mask].cpu())
        self.confusion.update(ClassificationTask.probabilities(logits[mask].cpu()), labels[mask].cpu())

    def compute(self) -> Evaluation:
        """Compute both."""
        confusion = self.confusion.compute()
        accuracy = float(confusion.diagonal().sum() / confusion.sum())
        places = confusion.nonzero()
        cells = torch.column_stack([places, confusion[places[:, 0], places[:, 1]]]).numpy()
        return Evaluation({"loss": float(self.loss.compute()), "accuracy": accuracy}, cells)

    def reset(self) -> None:
        """Clear both."""
        self.loss.reset()
        self.confusion.reset()

    def choose_thresholds(self) -> None:
        """There are none."""

    def fit_calibrator(self) -> None:
        """There is none."""

    def description(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class Switch(Callback):
    """Switches monitoring on and off within a fit, and measures steps and validations in both states.

    Args:
        switches: False: monitoring is always on.

    Attributes:
        steps: seconds of each step by (is on, is logged).
        validations: seconds of each validation by whether it is on.
        inside: seconds within monitoring by (class, method), while on.
        event_bytes: size of the event files after each epoch.
    """

    def __init__(self, *, switches: bool = True) -> None:
        self.switches = switches
        self.is_on = True
        self.steps: dict[tuple[bool, bool], list[float]] = defaultdict(list)
        self.validations: dict[bool, list[float]] = defaultdict(list)
        self.inside: dict[tuple[str, str], float] = defaultdict(float)
        self.event_bytes: list[int] = []
        self._step: tuple[float, bool, bool] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put a switch before each hook of monitoring."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if _is_monitoring(callback):
                for name in (*STEP_HOOKS, *VALIDATION_HOOKS):
                    if getattr(type(callback), name) is not getattr(Callback, name):
                        setattr(callback, name, self._switched(getattr(callback, name), type(callback).__name__, name))
        for logger in trainer.loggers:
            log_metrics = self._switched(logger.log_metrics, type(logger).__name__, "log_metrics")
            logger.log_metrics = log_metrics  # type: ignore[method-assign]
        pl_module.log = self._switched_log(pl_module.log)  # type: ignore[method-assign]
        metrics: Any = pl_module.metrics
        for name in ("update", "compute", "reset", "choose_thresholds"):
            setattr(metrics, name, self._switched(getattr(metrics, name), METRICS, name))
        module: Any = pl_module
        module._log_training_metrics = self._switched(module._log_training_metrics, METRICS, "log")
        loop: Any = trainer.fit_loop.epoch_loop
        hooks = [
            self._switched(hook, type(hook.__self__).__name__, "between_steps")
            if _is_monitoring(getattr(hook, "__self__", None))
            else hook
            for hook in loop._hooks
        ]
        loop._hooks = (self._tick, *hooks)
        loop.val_loop.run = functools.partial(self._validate, loop.val_loop.run, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put a switch before the training metrics, and leave out the first step, which fills the loader."""
        self._step = None
        if trainer.current_epoch == 0:
            metrics: Any = pl_module.training_metrics
            metrics.add = self._switched(metrics.add, METRICS, "add")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the size of the event files."""
        for logger in trainer.loggers:
            logger.publish()  # type: ignore[attr-defined]
        self.event_bytes.append(events_size(Path(trainer.default_root_dir)))

    def per_step(self, *, on: bool) -> float:
        """Seconds per step: one of :data:`LOG_EVERY` is logged."""
        plain, logged = (statistics.median(self.steps[on, is_logged]) for is_logged in (False, True))
        return plain + (logged - plain) / LOG_EVERY

    def _tick(self, trainer: pl.Trainer) -> None:
        now, step = time.perf_counter(), trainer.global_step
        if self._step is not None:
            began, was_on, was_logged = self._step
            self.steps[was_on, was_logged].append(now - began)
        if self.switches:
            self.is_on = step // LOG_EVERY % 2 == 1
        self._step = (time.perf_counter(), self.is_on, (step + 1) % LOG_EVERY == 0)

    def _validate(self, run: Callable[[], Any], module: Any) -> Any:
        """A validation with or without monitoring, in turn."""
        metrics, is_on = module.metrics, self.is_on
        if self.switches:
            self.is_on = sum(map(len, self.validations.values())) % 2 == 1
        if not self.is_on:
            module.metrics = BareMetrics(len(module.data.classes))
        began = time.perf_counter()
        try:
            return run()
        finally:
            self.validations[self.is_on].append(time.perf_counter() - began)
            module.metrics, self.is_on = metrics, is_on

    def _switched(self, function: Callable[..., Any], owner: str, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.is_on:
                return None
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.inside[owner, name] += time.perf_counter() - began
            return result

        return call

    def _switched_log(self, log: Callable[..., None]) -> Callable[..., None]:
        def call(name: str, *args: Any, **kwargs: Any) -> None:
            if self.is_on or not name.startswith("train/"):  # checkpoints need val/
                log(name, *args, **kwargs)

        return call


def events_size(run_dir: Path) -> int:
    """Bytes of a run's event files."""
    return sum(path.stat().st_size for path in (run_dir / "tensorboard").rglob("*") if path.is_file())


def _is_monitoring(value: object) -> bool:
    return type(value).__module__.startswith("job.monitoring") or isinstance(value, ProgressBar)


def images(folder: Path, classes: int, each: int) -> Path:
    """Noisy JPEGs of :data:`PIXELS` by :data:`PIXELS`, a colour per class."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        colour = rng.integers(0, 256, 3)
        target = folder / f"class-{number:04d}"
        target.mkdir(parents=True)
        for image in range(each):
            coarse = (colour + rng.normal(0, 40, (28, 28, 3))).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(buffer, "JPEG")
            (target / f"{image:04d}.jpg").write_bytes(buffer.getvalue())
    return folder


def run(
    folder: Path, data: Path, switch: Switch, *, backbone: str = "resnet18", features: bool = False, **trainer: Any
) -> None:
    """A fit with ``switch``."""
    config = ModelConfig(backbone=backbone, weights="none", milestones=[NEVER] * features)
    module = ImageDataModule(str(data), global_batch_size=BATCH, num_workers=1, cache_dir=str(folder / "cache"))
    fixed = {"accelerator": "cpu", "precision": "32-true", "log_every_n_steps": LOG_EVERY, "callbacks": [switch]}
    settings = FitSettings(
        run_dir=str(folder),
        trainer={**fixed, **trainer},
        config="",
        checkpoint=CheckpointSettings(every_n_epochs=NEVER, keep_last=1),
        features=FeatureSettings(use="always" if features else "never"),
    )
    fit(config, module, settings)


def step_row(table: Table, name: str, switch: Switch) -> None:
    """A row with the seconds of a step, on and off, and those within callbacks."""
    on, off = switch.per_step(on=True), switch.per_step(on=False)
    count = sum(len(values) for (is_on, _), values in switch.steps.items() if is_on)
    inside = sum(seconds for (_, hook), seconds in switch.inside.items() if hook not in VALIDATION_HOOKS) / count
    cells = (f"{1000 * off:.2f}", f"{1000 * on:.2f}", f"{on / off - 1:+.1%}", f"{1000 * inside:.2f}")
    table.add_row(name, *cells, f"{inside / off:.2%}")


def validation_row(table: Table, name: str, switch: Switch) -> None:
    """A row with the seconds of a validation, on and off, and those within metrics and callbacks."""
    off, on = (statistics.median(switch.validations[is_on]) for is_on in (False, True))
    count = len(switch.validations[True])
    metrics, callbacks = (
        sum(seconds for (owner, hook), seconds in switch.inside.items() if (owner == METRICS) == of_metrics) / count
        for of_metrics in (True, False)
    )
    cells = (f"{1000 * off:.0f}", f"{1000 * on:.0f}", f"{on / off - 1:+.1%}")
    inside = (f"{1000 * seconds:.1f} ({seconds / off:.1%})" for seconds in (metrics, callbacks))
    table.add_row(name, *cells, *inside)


def largest(switch: Switch) -> str:
    """Where most of the time of monitoring goes."""
    total = sum(switch.inside.values())
    ordered = sorted(switch.inside.items(), key=lambda item: -item[1])[:6]
    return ", ".join(f"{owner}.{hook} {seconds / total:.0%}" for (owner, hook), seconds in ordered)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4, help=f"epochs of {STEPS} steps from images, half of them on")
    parser.add_argument("--validations", type=int, default=8, help=f"of {IMAGES} images, half of them on")
    parser.add_argument("--classes", type=int, nargs="*", default=[2, 1000], help="of the validations and the events")
    options = parser.parse_args()
    console = Console(width=140)
    console.print(f"{library_versions()}, {torch.get_num_threads()} threads, batches of {BATCH}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = images(folder / "train", 2, STEPS * BATCH // 2 * 5 // 4)  # a fifth of each class validates
        table = Table("step", "off, ms", "on, ms", "overhead", "inside monitoring, ms", "of a step")
        notes = []
        switch = Switch()
        run(folder / "steps", train, switch, max_epochs=options.epochs, limit_val_batches=0)
        step_row(table, "resnet18 from images", switch)
        notes.append(f"steps from images: {largest(switch)}")
        switch = Switch()
        run(folder / "head", train, switch, features=True, max_epochs=20 * options.epochs, limit_val_batches=0)
        step_row(table, "its head from kept features", switch)
        notes.append(f"steps from features: {largest(switch)}")
        console.print(table)
        validations = Table("validation", "off, ms", "on, ms", "overhead", "inside metrics, ms", "inside callbacks, ms")
        events = Table("events", "first epoch, kB", "a later epoch, kB", "run of 3 epochs with all pictures, kB")
        for classes in options.classes:
            data = images(folder / str(classes), classes, max(5 * IMAGES // classes, 2))
            switch = Switch()
            limits = {"limit_train_batches": 1, "limit_val_batches": -(-IMAGES // BATCH)}
            run(folder / f"validations-{classes}", data, switch, max_epochs=options.validations, **limits)
            validation_row(validations, f"resnet18, {classes:,} classes", switch)
            notes.append(f"validation of {classes:,} classes: {largest(switch)}")
            switch = Switch(switches=False)
            run(folder / f"events-{classes}", data, switch, backbone="timm/test_resnet", max_epochs=3)
            first, before, last = switch.event_bytes
            total = events_size(folder / f"events-{classes}")  # with the pictures, which are drawn beside the training
            sizes = (f"{size / 1000:.0f}" for size in (first, last - before, total))
            events.add_row(f"{classes:,} classes", *sizes)
        console.print(validations)
        console.print(events)
        for note in notes:
            console.print(note)


if __name__ == "__main__":
    main()
