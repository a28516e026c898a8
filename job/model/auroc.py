"""Macro AUROC in memory that does not grow with the number of samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

BINS = 2048
LOG_ODDS = 16.0
"""Bins have equal widths in log-odds from -16 to 16, beyond which float32 rounds a probability to 0 or 1."""


class BinnedAUROC(Metric):
    """AUROC of each class against the others, from histograms of its log-odds.

    A pair of a positive and a negative sample in one bin counts one half. So the result differs from the exact one by
    at most half the fraction of such pairs: below 1e-3 unless most scores of a class are equal. Memory is 2 * BINS
    counts per class; the exact AUROC keeps a probability per sample and class. Log-odds resolve the small
    probabilities of many classes, which equally spaced thresholds would put into one bin.

    Args:
        num_classes: number of classes.
        ignore_index: label of samples to ignore.
        sync_on_compute: sum over ranks.
    """

    full_state_update = False
    positives: Tensor
    negatives: Tensor

    def __init__(self, num_classes: int, *, ignore_index: int, sync_on_compute: bool) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        for name in ("positives", "negatives"):
            self.add_state(name, torch.zeros(num_classes, BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch: probabilities float [B, C], labels int64 [B]."""
        counted = labels != self.ignore_index
        probabilities, labels = probabilities[counted].float(), labels[counted]
        bins = histogram_bins(probabilities) + torch.arange(self.num_classes) * BINS
        size = self.num_classes * BINS
        every = torch.bincount(bins.flatten(), minlength=size)
        positive_counts = torch.bincount(bins.gather(1, labels[:, None]).flatten(), minlength=size)
        self.positives += positive_counts.view_as(self.positives)
        self.negatives += (every - positive_counts).view_as(self.negatives)

    def compute(self) -> Tensor:
        """AUROC per class, float64 [C]; NaN for a class without positive or without negative samples."""
        positives, negatives = self.positives.double(), self.negatives.double()
        below = negatives.cumsum(dim=1) - negatives
        won = (positives * (below + negatives / 2)).sum(dim=1)
        return won / (positives.sum(dim=1) * negatives.sum(dim=1))


def histogram_bins(probabilities: Tensor) -> Tensor:
    """Bin of each probability, int64 of the same shape, from 0 to BINS - 1."""
    log_odds = torch.logit(probabilities, eps=1e-30).clamp(-LOG_ODDS, LOG_ODDS).nan_to_num()
    return ((log_odds + LOG_ODDS) * (BINS / (2 * LOG_ODDS))).long().clamp(max=BINS - 1)
