"""Learning-rate schedulers beyond torch's own."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from job.errors import ConfigError


class WarmupCosine(LRScheduler):
    """Linear warm-up over ``warmup`` intervals, then cosine annealing until ``total`` (arXiv:1608.03983).

    Args:
        optimizer: its learning rates are the peak of the schedule.
        warmup: number of warm-up epochs or steps (--model.lr_interval); the first has a learning rate above 0.
        total: number of epochs or steps, warm-up included.
        final_factor: final learning rate, relative to the peak.
    """

    def __init__(self, optimizer: Optimizer, warmup: int, total: int, final_factor: float = 0.0) -> None:
        if not 0 <= warmup < total or not 0 <= final_factor <= 1:
            raise ConfigError(
                f"WarmupCosine needs 0 <= warmup < total and a final_factor from 0 to 1, not {warmup}, {total}, "
                f"{final_factor}."
            )
        self.warmup = warmup
        self.total = total
        self.final_factor = final_factor
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate per parameter group."""
        if self.last_epoch < self.warmup:
            factor = (self.last_epoch + 1) / (self.warmup + 1)
        else:
            done = min((self.last_epoch - self.warmup) / (self.total - self.warmup), 1.0)
            factor = self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * done)) / 2
        return [float(base) * factor for base in self.base_lrs]
