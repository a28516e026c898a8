"""Learning rate range test (arXiv:1506.01186)."""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from job.errors import ConfigError

log = logging.getLogger(__name__)

SMOOTHING = 0.9
"""Decay of the running mean of losses, per step."""
DIVERGED = 4.0
"""The range test ends when the running mean exceeds its minimum by this factor."""
LEFT_OUT = 5
"""First steps, whose running mean is too noisy to use."""


class LRFinder(Callback):
    """Raises the head's learning rate geometrically over ``steps``; other groups keep their ratio to it.

    All ranks see the mean loss over all of them, so that they come to one suggestion.

    Args:
        lowest: rate of the first step.
        highest: rate of the last one.
        steps: optimizer steps, at least 20.

    Attributes:
        rates: of each step done, until the loss diverged.
        losses: of each, float32, over the global batch.
    """

    def __init__(self, lowest: float = 1e-6, highest: float = 1.0, steps: int = 100) -> None:
        if not 0 < lowest < highest:
            raise ConfigError(
                f"--lr_finder.lowest must be above 0 and below --lr_finder.highest, not {lowest} and {highest}."
            )
        if steps < 20:
            raise ConfigError(f"--lr_finder.steps must be at least 20, not {steps}.")
        self.lowest = lowest
        self.highest = highest
        self.steps = steps
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.optimizer = ""
        self._ratios: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the groups' ratios."""
        optimizer = trainer.optimizers[0]
        head = optimizer.param_groups[0]["initial_lr"]
        self._ratios = [group["initial_lr"] / head for group in optimizer.param_groups]
        self.optimizer = f"{type(optimizer).__module__.rpartition('.')[0]}.{type(optimizer).__name__}"

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        """Set this step's rate, whatever the scheduler says."""
        rate = self.lowest * (self.highest / self.lowest) ** (len(self.rates) / (self.steps - 1))
        for group, ratio in zip(trainer.optimizers[0].param_groups, self._ratios, strict=True):
            group["lr"] = rate * ratio
        self.rates.append(rate)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, and stop where it has diverged."""
        if len(self.rates) == len(self.losses):
            return  # gradients are being accumulated
        loss = cast("Tensor", trainer.strategy.reduce(outputs["loss"], reduce_op="mean"))
        self.losses.append(float(loss))
        means = smoothed(self.losses)
        diverged = not math.isfinite(self.losses[-1]) or means[-1] > DIVERGED * min(means)
        trainer.should_stop = len(self.losses) > LEFT_OUT and diverged

    def suggestion(self) -> float:
        """Learning rate at which the loss falls fastest.

        Raises:
            ConfigError: it falls nowhere, or is no number.
        """
        means = np.asarray(smoothed(self.losses))
        usable = int(np.argmin(np.isfinite(means))) if not np.isfinite(means).all() else len(means)
        means = means[:usable]
        if usable < LEFT_OUT + 3:
            raise ConfigError(f"the loss is not finite after {usable} steps. Lower --lr_finder.lowest.")
        lowest = int(means[LEFT_OUT:].argmin()) + LEFT_OUT
        slopes = np.gradient(means, np.log(self.rates[:usable]))[LEFT_OUT : lowest + 1]
        if slopes.min() >= 0:
            raise ConfigError(f"the loss falls at no learning rate in [{self.lowest}, {self.rates[usable - 1]:.3g}].")
        steepest = LEFT_OUT + int(slopes.argmin())
        if steepest <= LEFT_OUT:
            log.warning("the loss falls fastest at the lowest rates. Lower --lr_finder.lowest to be sure.")
        elif steepest >= self.steps - 2:
            log.warning("the loss falls fastest at the highest rates. Raise --lr_finder.highest to be sure.")
        return self.rates[steepest]


def smoothed(losses: list[float]) -> list[float]:
    """Bias-corrected running means."""
    mean, means = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**count))
    return means
