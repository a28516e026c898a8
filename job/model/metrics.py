"""What is measured at validation and test, synchronised over ranks by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

IGNORED = -1
"""Label of a sample that does not count."""


class EvaluationMetrics(nn.Module):
    """Loss, accuracy, macro F1, macro AUROC, accuracy a class and the confusion matrix."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        count = len(classes)
        self.loss = MeanMetric()
        self.accuracy = MulticlassAccuracy(count, average="micro", ignore_index=IGNORED)
        self.f1 = MulticlassF1Score(count, average="macro", ignore_index=IGNORED)
        self.auroc = MulticlassAUROC(count, average="macro", ignore_index=IGNORED)
        self.confusion = MulticlassConfusionMatrix(count, ignore_index=IGNORED)

    def update(self, losses: Tensor, probabilities: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Add a batch: losses [B], probabilities [B, C], labels int64 [B]; samples outside ``mask`` do not count."""
        self.loss.update(losses, weight=mask.float())
        labels = torch.where(mask, labels, IGNORED)  # shapes stay the same, whatever the mask
        for metric in (self.accuracy, self.f1, self.auroc, self.confusion):
            metric.update(probabilities, labels)

    def compute(self) -> tuple[dict[str, float], list[list[int]]]:
        """(value by name, confusion matrix as rows of true classes), the same on every rank."""
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
        return values, confusion.to(torch.int64).tolist()

    def reset(self) -> None:
        """Forget every batch."""
        for metric in (self.loss, self.accuracy, self.f1, self.auroc, self.confusion):
            metric.reset()
