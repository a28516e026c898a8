"""What is measured at validation and test, synchronised over ranks by torchmetrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

IGNORED = -1
"""Label of a sample that does not count."""


BATCHES_BEHIND = 2
"""Batches on an accelerator that are not fetched yet: it computes the last while the host looks at one before."""


class EvaluationMetrics:
    """Loss, accuracy, macro F1, macro AUROC, accuracy a class and the confusion matrix; counted in host memory.

    Of an accelerator's batches those are fetched that it has finished, so that neither waits for the other.

    Args:
        classes: names, in the order of labels.
        synchronise: sum over ranks, each of which has seen its own batches.
    """

    def __init__(self, classes: Sequence[str], *, synchronise: bool = True) -> None:
        self.classes = tuple(classes)
        count = len(classes)
        options: dict[str, Any] = {"ignore_index": IGNORED, "sync_on_compute": synchronise}
        self.loss = MeanMetric(sync_on_compute=synchronise)
        self.accuracy = MulticlassAccuracy(count, average="micro", **options)
        self.f1 = MulticlassF1Score(count, average="macro", **options)
        self.auroc = MulticlassAUROC(count, average="macro", **options)
        self.confusion = MulticlassConfusionMatrix(count, **options)
        self._behind: deque[tuple[Tensor, ...]] = deque()

    def update(self, losses: Tensor, probabilities: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Add a batch: losses [B], probabilities [B, C], labels int64 [B]; samples outside ``mask`` do not count."""
        self._behind.append((losses, probabilities, labels, mask))
        self._count(0 if losses.is_cpu else BATCHES_BEHIND)

    def _count(self, leave: int) -> None:
        while len(self._behind) > leave:
            losses, probabilities, labels, mask = (tensor.cpu() for tensor in self._behind.popleft())
            self.loss.update(losses, weight=mask.float())
            labels = torch.where(mask, labels, IGNORED)
            for metric in (self.accuracy, self.f1, self.auroc, self.confusion):
                metric.update(probabilities, labels)

    def compute(self) -> tuple[dict[str, float], Tensor]:
        """(value by name, confusion matrix int64 [true class, predicted class]), the same on every rank."""
        self._count(0)
        confusion: Tensor = self.confusion.compute()
        values = {
            "loss": self.loss.compute().item(),
            "accuracy": self.accuracy.compute().item(),
            "f1": self.f1.compute().item(),
            "auroc": self.auroc.compute().item(),
        }
        per_class = confusion.diagonal() / confusion.sum(dim=1).clamp(min=1)
        for name, value in zip(self.classes, per_class.tolist(), strict=True):
            values[f"accuracy_of/{name}"] = value
        return values, confusion.to(torch.int64)

    def reset(self) -> None:
        """Forget every batch."""
        self._behind.clear()
        for metric in (self.loss, self.accuracy, self.f1, self.auroc, self.confusion):
            metric.reset()
