"""Largest batch that fits in memory, extrapolated from two small ones."""

from __future__ import annotations

import contextlib
import ctypes
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

log = logging.getLogger(__name__)

MARGIN = 0.1
"""Share of the memory that is left free."""
FIRST_SIZE, LAST_SIZE = 4, 4096
"""Images of the smaller batch that is measured, and at most of the larger one."""
NOTICEABLE = 64e6
"""Bytes by which the larger batch must need more: allocators keep some in reserve."""
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


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
        if trainer.is_global_zero:
            log.info("measuring the memory that a batch needs")
        stage, buffers = module.stage, {name: buffer.clone() for name, buffer in module.net.named_buffers()}
        module.enter_stage(Stage.ALL)
        _run(trainer, module, FIRST_SIZE)  # what is allocated once
        small, size = _peak(trainer, module, FIRST_SIZE), 4 * FIRST_SIZE
        while (more := _peak(trainer, module, size) - small) < NOTICEABLE and size < LAST_SIZE:
            size *= 2
        self.bytes_each = max(more, 1.0) / (size - FIRST_SIZE)
        optimizer = sum(2 * parameter.nbytes for parameter in module.net.parameters())  # of Adam; none has more
        allowed = (1 - MARGIN) * (small + _free(module.device)) - optimizer
        fits = int(FIRST_SIZE + (allowed - small) / self.bytes_each)
        fits = min(int(size) for size in ranks.union({str(fits)}))
        while module.device.type == "cuda" and fits > 0 and ranks.union(_failure(trainer, module, fits)):
            fits = int(fits * (1 - MARGIN))
        module.enter_stage(stage)
        module.net.load_state_dict(buffers, strict=False)
        if fits < 1:
            raise ConfigError(f"not enough memory for one image, which needs {self.bytes_each / 1e6:.0f} MB.")
        self.per_rank = fits - fits % 8 if fits >= 8 else fits


def _run(trainer: pl.Trainer, module: TransferLearningModel, size: int) -> None:
    """Forward and backward pass of one rank's batch, without the others."""
    image_size = module.net.image_size
    with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context():
        images = torch.randint(256, (size, 3, image_size, image_size), dtype=torch.uint8).to(module.device)
        labels = torch.zeros(size, dtype=torch.int64, device=module.device)
        losses = module.training_losses({"image": images, "label": labels})  # type: ignore[typeddict-item]
    losses.mean().backward()  # type: ignore[no-untyped-call]
    module.zero_grad(set_to_none=True)


def _peak(trainer: pl.Trainer, module: TransferLearningModel, size: int) -> float:
    """Bytes held at most while a batch is computed."""
    if module.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(module.device)
        _run(trainer, module, size)
        return float(torch.cuda.max_memory_allocated(module.device))
    # What was freed and is still held would hide a part of the batch.
    with contextlib.suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: proc_pid_clear_refs(5)
    _run(trainer, module, size)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def _free(device: torch.device) -> float:
    """Bytes that this rank may take, besides those it holds."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_bytes = 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    for limit, used in CGROUP_FILES:
        if Path(limit).exists() and (most := Path(limit).read_text().strip()) != "max":
            free_bytes = min(free_bytes, float(most) - float(Path(used).read_text()))
    return free_bytes / ranks.local_world_size()


def _failure(trainer: pl.Trainer, module: TransferLearningModel, size: int) -> set[str]:
    try:
        _run(trainer, module, size)
    except torch.OutOfMemoryError as error:
        module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return {first_line(error)}
    return set()
