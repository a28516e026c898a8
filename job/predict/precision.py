"""Floating-point precision of predictions."""

from __future__ import annotations

from typing import Literal

import torch

from job.process.cpus import multiplies_bf16

Precision = Literal["bf16", "fp32"]
"""bf16: autocast, as ``--trainer.precision bf16-mixed``; fp32: as 32-true."""


def automatic_precision(device: torch.device) -> Precision:
    """bf16 where the device multiplies it natively, as in training and validation, else fp32.

    On a CPU with AVX512-BF16 (2 cores, batches of 32 at 224 px) bf16 is 1.1 to 1.8 times as fast for
    EfficientNet-Lite0, ResNet-18 and ResNet-50, and 4 times for ViT-Ti. Elsewhere it is emulated, and slower.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if device.type == "cpu" and multiplies_bf16() else "fp32"


def describe_device(device: torch.device) -> str:
    """Name of a device, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread(s)" if device.type == "cpu" else str(device)
