"""Confidence against accuracy, in memory that does not grow with the number of predictions."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from job.model.evaluation import CALIBRATION_BINS, Calibration


class BinnedCalibration(Metric):
    """Counts predictions by confidence, from which the expected calibration error (ECE) follows exactly.

    torchmetrics' CalibrationError keeps the confidence of each prediction, and returns no diagram.
    """

    full_state_update = False
    counts: Tensor
    confidence: Tensor

    def __init__(self, *, sync_on_compute: bool) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("counts", torch.zeros(CALIBRATION_BINS, 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("confidence", torch.zeros(CALIBRATION_BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, confidences: Tensor, correct: Tensor) -> None:
        """Add predictions: confidences float [N], correct bool [N]."""
        bins = (confidences * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)
        self.counts += torch.bincount(2 * bins + correct, minlength=2 * CALIBRATION_BINS).view(-1, 2)
        self.confidence += torch.bincount(bins, confidences.double(), minlength=CALIBRATION_BINS)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Wrong and correct predictions per bin, int64 [bins, 2], and sums of confidences, of all ranks."""
        # On XLA what was summed over ranks lies on the chips.
        return self.counts.cpu(), self.confidence.cpu()

    def calibration(self) -> Calibration:
        """The diagram of all ranks."""
        counts, confidence = self.compute()
        return Calibration(counts.sum(dim=1).numpy(), confidence.numpy(), counts[:, 1].numpy())
