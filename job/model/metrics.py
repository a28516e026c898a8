"""Metrics of validation and test, synchronised over ranks by torchmetrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from job.model.auroc import BinnedAUROC

IGNORED = -1
"""Label of a sample to ignore."""

BATCHES_BEHIND = 2
"""Latest batches on an accelerator that are not fetched yet, so that the host does not wait for it."""

PER_CLASS_LIMIT = 50
"""Number of classes up to which the accuracy of each is logged; the confusion matrix contains all."""

EXACT_CLASSES, EXACT_SAMPLES = 100, 50_000
"""Sizes up to which AUROC is exact; it keeps a probability per sample and class, 20 MB at the limits."""


class EvaluationMetrics:
    """Loss, accuracy, macro F1, macro AUROC, accuracy per class and the confusion matrix, in host memory.

    Batches on an accelerator are fetched later, so that the host does not wait for it.

    Above 100 classes or 50,000 samples AUROC is computed from histograms; see
    :class:`~job.model.auroc.BinnedAUROC` for the error bound.

    Args:
        classes: class names, in the order of labels.
        samples: size of the largest data set that is evaluated.
        synchronise: sum over ranks, each of which evaluates its own batches.
    """

    def __init__(self, classes: Sequence[str], *, samples: int = 0, synchronise: bool = True) -> None:
        self.classes = tuple(classes)
        count = len(classes)
        options: dict[str, Any] = {"ignore_index": IGNORED, "sync_on_compute": synchronise}
        # The default strategy ignores NaN: a network that has diverged would have a finite loss.
        self.loss = MeanMetric(sync_on_compute=synchronise, nan_strategy="disable")
        self.accuracy = MulticlassAccuracy(count, average="micro", **options)
        self.f1 = MulticlassF1Score(count, average="macro", **options)
        self.auroc: Metric
        if count > EXACT_CLASSES or samples > EXACT_SAMPLES:
            self.auroc = BinnedAUROC(count, **options)
        else:
            self.auroc = MulticlassAUROC(count, average=None, **options)
        self.confusion = MulticlassConfusionMatrix(count, **options)
        self._pending: deque[tuple[Tensor, ...]] = deque()

    def update(self, losses: Tensor, probabilities: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Add a batch: losses [B], probabilities [B, C], labels int64 [B]; samples outside ``mask`` are ignored."""
        self._pending.append((losses, probabilities, labels, mask))
        self._process(0 if losses.is_cpu else BATCHES_BEHIND)

    def _process(self, remaining: int) -> None:
        while len(self._pending) > remaining:
            losses, probabilities, labels, mask = (tensor.cpu() for tensor in self._pending.popleft())
            self.loss.update(losses[mask])
            labels = torch.where(mask, labels, IGNORED)
            for metric in (self.accuracy, self.f1, self.auroc, self.confusion):
                metric.update(probabilities, labels)

    def compute(self) -> tuple[dict[str, float], Tensor]:
        """Compute metrics and confusion matrix, the same on every rank.

        A metric that is undefined for these samples is omitted: every metric without samples, the accuracy of a class
        without samples, AUROC of a single class. Macro AUROC is the mean over the classes that have positive and
        negative samples.

        Returns:
            metrics by name, and the confusion matrix, int64 [C, C] on the CPU; rows are true classes.
        """
        self._process(0)
        confusion: Tensor = self.confusion.compute().to("cpu", torch.int64)
        support, total = confusion.sum(dim=1), int(confusion.sum())
        if not total:
            return {}, confusion
        values = {
            name: metric.compute().item()
            for name, metric in (("loss", self.loss), ("accuracy", self.accuracy), ("f1", self.f1))
        }
        defined = (support > 0) & (support < total)
        if defined.any():
            values["auroc"] = self.auroc.compute()[defined].mean().item()
        if len(self.classes) <= PER_CLASS_LIMIT:
            per_class = confusion.diagonal() / support.clamp(min=1)
            for name, value, count in zip(self.classes, per_class.tolist(), support.tolist(), strict=True):
                if count:
                    values[f"accuracy_of/{name}"] = value
        return values, confusion

    def reset(self) -> None:
        """Clear all metrics."""
        self._pending.clear()
        for metric in (self.loss, self.accuracy, self.f1, self.auroc, self.confusion):
            metric.reset()


def metric_names(classes: Sequence[str]) -> list[str]:
    """Names that :meth:`EvaluationMetrics.compute` may return."""
    per_class = [f"accuracy_of/{name}" for name in classes] if len(classes) <= PER_CLASS_LIMIT else []
    return ["loss", "accuracy", "f1", "auroc", *per_class]
