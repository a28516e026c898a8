"""Forward and backward pass of one rank's batch, and the memory that it takes."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import pytorch_lightning as pl
import torch

from job.cluster import ranks
from job.model.module import TransferLearningModel

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def run_step(
    trainer: pl.Trainer, module: TransferLearningModel, size: int, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Forward and backward pass of one rank's batch, without the others.

    Args:
        trainer: in a fit.
        module: of the trainer.
        size: images of the batch.
        optimizer: takes a step; default: the gradients are thrown away.
    """
    image_size = module.net.image_size
    with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context():
        images = torch.randint(256, (size, 3, image_size, image_size), dtype=torch.uint8).to(module.device)
        labels = torch.zeros(size, dtype=torch.int64, device=module.device)
        losses = module.training_losses({"image": images, "label": labels})  # type: ignore[typeddict-item]
    losses.mean().backward()  # type: ignore[no-untyped-call]
    if optimizer is not None:
        optimizer.step()
    module.zero_grad(set_to_none=True)


def peak_bytes(trainer: pl.Trainer, module: TransferLearningModel, size: int) -> float:
    """Bytes held at most while a batch is computed."""
    if module.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(module.device)
        run_step(trainer, module, size)
        return float(torch.cuda.max_memory_allocated(module.device))
    # What was freed and is still held would hide a part of the batch.
    with contextlib.suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: proc_pid_clear_refs(5)
    run_step(trainer, module, size)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def held_bytes(device: torch.device) -> float:
    """Bytes that this process holds."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> float:
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
