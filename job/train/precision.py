"""Default precision for this hardware."""

from __future__ import annotations

import logging

import torch

from job.cluster import ranks
from job.process.cpus import multiplies_bf16

log = logging.getLogger(__name__)


def automatic_precision(accelerator: str) -> str:
    """bf16-mixed where every rank's hardware multiplies bf16 natively, else 32-true.

    These are CUDA devices of compute capability 8.0 or more, and CPUs with AMX or AVX512-BF16; elsewhere bf16 is
    emulated, and slower than float32. Called by all ranks together.

    Args:
        accelerator: Lightning's name of one.
    """
    return "32-true" if ranks.union(set() if _multiplies_bf16(accelerator) else {"32-true"}) else "bf16-mixed"


def _multiplies_bf16(accelerator: str) -> bool:
    if uses_cuda(accelerator):
        return torch.cuda.get_device_capability(ranks.local_rank()) >= (8, 0)
    if accelerator not in ("auto", "cpu") or (accelerator == "auto" and torch.backends.mps.is_available()):
        return False
    return multiplies_bf16()


def uses_cuda(accelerator: str) -> bool:
    """Whether Lightning would choose CUDA."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def announce(accelerator: str, precision: str, *, automatic: bool) -> None:
    """Let float32 matrix products use TF32 on CUDA where nobody asked for 32 bits, and say what is computed with."""
    where = f"{torch.get_num_threads()} CPU thread(s) each"
    if uses_cuda(accelerator):
        where = torch.cuda.get_device_name(ranks.local_rank())
        if automatic:
            torch.set_float32_matmul_precision("high")
    why = " (chosen for this hardware; change it by --trainer.precision)" if automatic else ""
    log.info("%d process(es), %s, precision %s%s", ranks.world_size(), where, precision, why)
