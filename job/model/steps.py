"""Arithmetic of optimizer steps: batches per epoch, accumulation windows, steps of a whole run."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler


def accumulation(trainer: pl.Trainer, epoch: int) -> int:
    """Batches per optimizer step in ``epoch``; a GradientAccumulationScheduler takes precedence."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def completes_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step follows the batch that trains now."""
    return trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def batches_per_epoch(trainer: pl.Trainer, size: int, global_batch_size: int) -> int:
    """Batches of an epoch over ``size`` samples, within ``limit_train_batches``."""
    batches = -(-size // global_batch_size)
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def optimizer_steps(trainer: pl.Trainer, size: int, global_batch_size: int) -> int | None:
    """Optimizer steps of the whole run, counted from step 0; None without ``max_epochs``.

    Like ``Trainer.estimated_stepping_batches``, but it works under GradientAccumulationScheduler and before the
    data loaders exist.
    """
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return None
    batches = batches_per_epoch(trainer, size, global_batch_size)
    return sum(-(-batches // accumulation(trainer, epoch)) for epoch in range(trainer.max_epochs))


def window_samples(batch_idx: int, accumulate: int, batches: int, size: int, global_batch_size: int) -> int:
    """Samples, over all ranks, in the accumulation window of batch ``batch_idx``.

    Args:
        batch_idx: index of the batch in its epoch.
        accumulate: batches per optimizer step.
        batches: batches per epoch; the last window may be shorter.
        size: samples in the data set.
        global_batch_size: samples per batch over all ranks; the last batch may be smaller.
    """
    first = batch_idx - batch_idx % accumulate
    last = min(first + accumulate, batches)
    return min(last * global_batch_size, size) - first * global_batch_size
