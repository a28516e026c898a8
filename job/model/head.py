"""The classification head, and the CPU threads that a training step uses.

A small head that trains alone takes its steps on one thread: waking another thread for each of its short operations
costs more than it saves. 32 samples of 512 features take 12 ms on two threads and 5 ms on one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_STEP_FLOPS = 2.5e8
"""A head whose training step has fewer is small: 5 to 10 ms of one core."""


class DropoutLinear(nn.Linear):
    """A linear layer with dropout of its inputs; its state dict is that of ``nn.Linear``.

    Args:
        inputs: width of the input.
        outputs: width of the output.
        dropout: probability that an input is zeroed in training.
    """

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__(inputs, outputs)
        self.dropout = dropout

    def forward(self, values: Tensor) -> Tensor:
        """float [B, inputs] to float [B, outputs]."""
        return super().forward(F.dropout(values, self.dropout, self.training))


def build_head(features: int, hidden: Sequence[int], logits: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers ``features → hidden… → logits`` with ReLU between them, and dropout before each.

    Names of parameters do not depend on ``dropout``: for inference the head is built without it.
    """
    widths = [features, *hidden, logits]
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        linear = DropoutLinear(width, following, dropout) if dropout else nn.Linear(width, following)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


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
