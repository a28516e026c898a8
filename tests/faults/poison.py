"""A Lightning callback that makes values of a training step infinite or NaN."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn


class Poison(Callback):
    """Multiplies the logits by ``value`` in some batches, or overwrites a running statistic with it.

    Args:
        first: number of the first batch, counted over epochs.
        count: how many batches.
        rank: the rank that does it; None: all.
        value: "nan" or "inf".
        statistic: overwrite the first floating-point buffer of the backbone instead.
    """

    def __init__(
        self, first: int, count: int = 1, rank: int | None = None, value: str = "nan", statistic: bool = False
    ) -> None:
        self.batches = range(first, first + count)
        self.rank = rank
        self.value = float(value)
        self.statistic = statistic
        self.active = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output * self.value if self.active and module.training else output

        pl_module.net.head.register_forward_hook(hook)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        due = trainer.fit_loop.epoch_loop.total_batch_idx in self.batches
        self.active = due and self.rank in (None, trainer.global_rank) and not self.statistic
        if due and self.statistic:
            next(b for b in pl_module.net.backbone.buffers() if b.is_floating_point()).fill_(self.value)

    def on_train_batch_end(self, *args: Any) -> None:
        self.active = False
