"""The average of the weights over the last steps, which often predicts better than the weights of any one of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of a network's weights and running statistics.

    After each step ``average = decay * average + (1 - decay) * weights``, with decay rising to its final value as in
    TensorFlow's ``ExponentialMovingAverage``. Frozen entries equal their average to the bit.

    Args:
        net: whose weights are averaged, from what they are now on.
        decay: what is left of the average in a step, once it has risen.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self._entries = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
        self._others = {name: value.clone() for name, value in self._entries.items()}
        self._moving: list[str] = []
        self._swapped = False
        self.follow(net)

    def load(self, averages: dict[str, Tensor]) -> None:
        """Go on from what :meth:`averages` once gave; without a name, from the weights."""
        for name in self._others.keys() & averages.keys():
            self._others[name].copy_(averages[name])

    def follow(self, net: nn.Module) -> None:
        """From here on take in what trains in ``net`` now; the rest stays equal to its average."""
        trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
        counted = {
            name
            for prefix, module in net.named_modules()
            if module.training
            for name, _ in module.named_buffers(prefix, recurse=False)
        }
        self._moving = [name for name in self._entries if name in trained | counted]

    def update(self, step: int) -> None:
        """Take in the weights of after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([of[name] for name in self._moving] for of in (self._others, self._entries))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def swap(self, *, averaged: bool) -> None:
        """Let the network hold the averages, or the weights in training again."""
        if averaged != self._swapped:
            for name, value in self._entries.items():
                kept = value.clone()
                value.copy_(self._others[name])
                self._others[name].copy_(kept)
            self._swapped = averaged

    @property
    def training(self) -> dict[str, Tensor]:
        """Weights in training, by name."""
        return self._others if self._swapped else self._entries

    @property
    def averages(self) -> dict[str, Tensor]:
        """Their averages, by name."""
        return self._entries if self._swapped else self._others
