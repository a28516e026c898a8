"""Memory format of a backbone: channels_last only where it is known to be correct.

On a CPU, torch 2.14 writes outside of its memory in the backward pass of strided 1x1 convolutions with fewer than 16
input channels in channels_last, for large images: a crash, or worse. So a CPU uses this layout only for architectures
that benchmarks/memory_formats.py has run, forward and backward, under a heap checker. CUDA uses it for all: the fault
is in the CPU's kernels, and tensor cores are faster with it.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from job.model.channels_last import CHANNELS_LAST_ON_CPU

log = logging.getLogger(__name__)

SAFE_CHANNELS = 16


def memory_format(name: str, backbone: nn.Module, device_type: str) -> torch.memory_format:
    """Choose the memory format for the architecture ``name`` on a type of device ("cpu", "cuda", …)."""
    if device_type == "cuda":
        return torch.channels_last
    listed = name.split(".")[0] in CHANNELS_LAST_ON_CPU  # a timm name may end in the tag of its weights
    if device_type == "cpu" and listed and not any(map(_is_unsafe, backbone.modules())):
        return torch.channels_last
    return torch.contiguous_format


def log_layout(name: str, layout: torch.memory_format, device_type: str) -> None:
    """Log that a CPU does not use channels_last."""
    if device_type == "cpu" and layout != torch.channels_last:
        log.info(
            "%s runs in the default memory format: it is not on the list of architectures tested in channels_last", name
        )


def _is_unsafe(module: nn.Module) -> bool:
    """Whether the backward pass of this convolution may write out of bounds in channels_last on a CPU."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < SAFE_CHANNELS
    )
