"""CPU threads of a training step: all of them for a backbone, one where a small head trains alone.

To wake another thread for each of a head's short operations takes longer than what it then saves: 32 samples of 512
features take 12 ms with two threads, 5 ms with one, where a core's other thread does not happen to be awake already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

ONE_THREAD_FLOPS = 2.5e8
"""A step of a head with fewer stays on one thread: 5 to 10 ms of a core."""


def is_short(head: nn.Module, rows: int) -> bool:
    """Whether a step of ``head`` with a batch of ``rows`` is faster on one thread."""
    weights = sum(parameter.numel() for parameter in head.parameters())
    return 6 * rows * weights < ONE_THREAD_FLOPS  # a product and a sum a weight, forward; twice that backward


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Within, torch's operations use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
