"""Largest batch that fits in memory, extrapolated from two small ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from job.cluster import ranks
from job.errors import ConfigError, first_line
from job.model.freeze import Stage
from job.model.module import TransferLearningModel
from job.train.step_memory import free_bytes, peak_bytes, run_step

log = logging.getLogger(__name__)

MARGIN = 0.1
"""Share of the memory that is left free."""
FIRST_SIZE, LAST_SIZE = 4, 4096
"""Images of the smaller batch that is measured, and at most of the larger one."""
NOTICEABLE = 64e6
"""Bytes by which the larger batch must need more: allocators keep some in reserve."""


class BatchSizeFinder(Callback):
    """Measures forward and backward pass of two small batches, with all layers training, before the first step.

    Memory grows in a line with the batch: so the largest is where the line meets what is free, less a margin. On CUDA
    it is tried. Ranks agree on the smallest of theirs.

    Attributes:
        per_rank: images per rank, a multiple of 8 where that many fit; 0: not measured, which takes CUDA or Linux.
        bytes_each: memory per image.
    """

    def __init__(self) -> None:
        self.per_rank = 0
        self.bytes_each = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, on all ranks together, and leave the module as it was.

        Raises:
            ConfigError: not even one image fits.
        """
        module = cast("TransferLearningModel", pl_module)
        if module.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
            return
        log.info("measuring the memory that a batch needs")
        stage, buffers = module.stage, {name: buffer.clone() for name, buffer in module.net.named_buffers()}
        module.enter_stage(Stage.ALL)
        run_step(trainer, module, FIRST_SIZE)  # what is allocated once
        small, size = peak_bytes(trainer, module, FIRST_SIZE), 4 * FIRST_SIZE
        while (more := peak_bytes(trainer, module, size) - small) < NOTICEABLE and size < LAST_SIZE:
            size *= 2
        self.bytes_each = max(more, 1.0) / (size - FIRST_SIZE)
        trained = [parameter for parameter in module.net.parameters() if parameter.requires_grad]
        optimizer = sum(2 * parameter.nbytes for parameter in trained)  # of Adam; none has more
        allowed = (1 - MARGIN) * (small + free_bytes(module.device)) - optimizer
        fits = int(FIRST_SIZE + (allowed - small) / self.bytes_each)
        fits = min(int(size) for size in ranks.union({str(fits)}))
        while module.device.type == "cuda" and fits > 0 and ranks.union(_failure(trainer, module, fits)):
            fits = int(fits * (1 - MARGIN))
        module.enter_stage(stage)
        module.net.load_state_dict(buffers, strict=False)
        if fits < 1:
            raise ConfigError(f"not enough memory for one image, which needs {self.bytes_each / 1e6:.0f} MB.")
        self.per_rank = fits - fits % 8 if fits >= 8 else fits


def _failure(trainer: pl.Trainer, module: TransferLearningModel, size: int) -> set[str]:
    try:
        run_step(trainer, module, size)
    except torch.OutOfMemoryError as error:
        module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return {first_line(error)}
    return set()
