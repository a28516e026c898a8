"""The classification head, and the CPU threads that a training step uses.

A small head that trains alone takes its steps on one thread: waking another thread for each of its short operations
costs more than it saves. 32 samples of 512 features take 12 ms on two threads and 5 ms on one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

SMALL_STEP_FLOPS = 2.5e8
"""A head whose training step has fewer is small: 5 to 10 ms of one core."""


def build_head(features: int, hidden: Sequence[int], logits: int) -> nn.Sequential:
    """Linear layers ``features → hidden… → logits`` with ReLU between them."""
    widths = [features, *hidden]
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], logits))


def is_small_head(head: nn.Module, batch_size: int) -> bool:
    """Whether a training step of ``head`` alone is faster on one thread."""
    weights = sum(parameter.numel() for parameter in head.parameters())
    return 6 * batch_size * weights < SMALL_STEP_FLOPS  # per weight 2 forward and 4 backward


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Context in which torch's CPU operations use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
