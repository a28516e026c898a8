"""Norm of the gradients, before they are clipped."""

from __future__ import annotations

from typing import Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from job.lightning_internals import gradient_scale, logs_are_due
from job.model.module import training_groups


class GradientNorm(Callback):
    """Logs the norm of the gradients as ``train/grad_norm``, where the step's logs are due.

    Gradients are those of the optimizer step: the mean over the samples of all ranks and accumulated batches, before
    clipping, without the factor of a GradScaler. XLA, which would compile another program for these steps, has none.

    Args:
        groups: "per_group" also logs the norm of each parameter group as ``train/grad_norm/…``.
    """

    def __init__(self, groups: Literal["total", "per_group"]) -> None:
        self.groups = groups

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log the norm."""
        if not logs_are_due(trainer) or pl_module.device.type == "xla":
            return
        gradients: dict[str, list[Tensor]] = {}
        for name, group in training_groups(trainer):
            mine = gradients.setdefault(name, [])
            mine += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        scale = gradient_scale(trainer, optimizer)
        norms = {name: get_total_norm(mine).float() / scale for name, mine in gradients.items() if mine}
        if not norms:
            return
        pl_module.log("train/grad_norm", torch.stack(list(norms.values())).norm())
        if self.groups == "per_group":
            pl_module.log_dict({f"train/grad_norm/{name}": norm for name, norm in norms.items()})
