"""Logits and labels of validation samples, all or a bounded number of them, to which a calibrator is fitted."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from job.cluster import ranks
from job.model.selection import spread_keys

MOST_SAMPLES = 50_000
MOST_LOGITS = 1 << 22
"""Logits of all samples and ranks that are kept, 16 MiB."""


class LogitSample(Metric):
    """Keeps samples that are evenly spread over the data, which follow from sample ids alone."""

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]
    samples: list[Tensor]

    def __init__(self, *, sync_on_compute: bool) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self._ranks = ranks.world_size() if sync_on_compute else 1
        for name in ("logits", "labels", "samples"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, samples: Tensor) -> None:
        """Add samples: logits float [N, num_logits]; labels int64 [N], or multi-hot, uint8 [N, C]; ids int64 [N]."""
        for state, values in zip(self._states(), (logits.float(), labels, samples), strict=True):
            state.append(values)
        capacity = max(min(MOST_SAMPLES, MOST_LOGITS // logits.shape[1]) // self._ranks, 1)
        if sum(map(len, self.samples)) > 2 * capacity:
            self._thin(capacity)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, labels and ids of the samples of all ranks."""
        # On XLA what was summed over ranks lies on the chips.
        logits, labels, samples = (dim_zero_cat(state).cpu() for state in self._states())
        return logits, labels, samples

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Logits [N, num_logits] and labels of the samples of all ranks, in the order of sample ids."""
        width = self.logits[0].shape[1]
        several = self.labels[0].ndim == 2
        logits, labels, samples = self.compute()
        samples = samples.reshape(-1)  # torchmetrics squeezes the tensors of a single sample
        order = samples.argsort()
        capacity = max(min(MOST_SAMPLES, MOST_LOGITS // width), 1)
        if len(order) > capacity:
            order = order[_evenly_spread(samples[order], capacity)]
        return logits.reshape(-1, width)[order], (labels.reshape(-1, width) if several else labels.reshape(-1))[order]

    def _thin(self, capacity: int) -> None:
        chosen = _evenly_spread(torch.cat(self.samples), capacity)
        for state in self._states():
            state[:] = [torch.cat(state)[chosen]]

    def _states(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.logits, self.labels, self.samples


def _evenly_spread(samples: Tensor, count: int) -> Tensor:
    """Places of the ``count`` samples that are selected, ascending."""
    keys = torch.from_numpy(spread_keys(samples))
    return keys.argsort(stable=True)[:count].sort().values
