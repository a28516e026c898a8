"""Exponential moving average (EMA) of a network's weights.

torch.optim.swa_utils.AveragedModel and Lightning's EMAWeightAveraging do not replace it: both copy the whole module and
average all of it in each step, also a frozen backbone; both average with a constant decay, or need a function that
replaces it; both save the averages under names of their own, where checkpoints of this job hold them as ``state_dict``,
so that any reader predicts with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from job.checkpoint.state import TRAINING_WEIGHTS_KEY
from job.model.spec import PREFIX, net_state


class WeightAverage:
    """EMA of a network's weights and of the running statistics of its normalisation layers.

    After each step ``average = decay * average + (1 - decay) * weights``, with decay rising to its final value as in
    TensorFlow's ``ExponentialMovingAverage``. The average of a frozen weight equals the weight, bit for bit.

    Args:
        net: network whose current weights are the first average.
        decay: final EMA decay.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self._network = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
        self._stored = {name: value.clone() for name, value in self._network.items()}
        self._trained: list[str] = []
        self._swapped = False
        self.set_trained(net)

    def load(self, averages: dict[str, Tensor]) -> None:
        """Restore averages by name; other weights keep their current value as average."""
        for name in self._stored.keys() & averages.keys():
            self._stored[name].copy_(averages[name])

    def set_trained(self, net: nn.Module) -> None:
        """Update only the averages of what trains in ``net`` now; call it when layers are frozen or unfrozen."""
        parameters = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
        statistics = {
            name
            for prefix, module in net.named_modules()
            if module.training
            for name, _ in module.named_buffers(prefix, recurse=False)
        }
        self._trained = [name for name in self._network if name in parameters | statistics]

    def update(self, step: int) -> None:
        """Add the weights after ``step`` optimizer steps to the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([tensors[name] for name in self._trained] for tensors in (self._stored, self._network))
        get_ema_multi_avg_fn(decay)(averages, weights, step)  # type: ignore[no-untyped-call]

    def swap(self, *, averaged: bool) -> None:
        """Let the network hold the averages, or the weights in training again."""
        if averaged != self._swapped:
            for name, value in self._network.items():
                kept = value.clone()
                value.copy_(self._stored[name])
                self._stored[name].copy_(kept)
            self._swapped = averaged

    @property
    def training(self) -> dict[str, Tensor]:
        """Weights in training, by name."""
        return self._stored if self._swapped else self._network

    @property
    def averages(self) -> dict[str, Tensor]:
        """Averages, by name."""
        return self._network if self._swapped else self._stored

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the averages into the checkpoint's ``state_dict``, and the weights in training beside it."""
        checkpoint["state_dict"] |= {f"{PREFIX}{name}": value for name, value in self.averages.items()}
        different = {name: w for name, w in self.training.items() if not torch.equal(w, self.averages[name])}
        checkpoint[TRAINING_WEIGHTS_KEY] = different


def extract_averages(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the averages in a checkpoint; its ``state_dict`` holds the weights in training afterwards."""
    averages = net_state(checkpoint, "the checkpoint")
    checkpoint["state_dict"] |= {f"{PREFIX}{name}": value for name, value in checkpoint[TRAINING_WEIGHTS_KEY].items()}
    return averages
