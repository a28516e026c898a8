"""Metrics of validation and test, synchronised over ranks by torchmetrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from job.model.evaluation import Evaluation
from job.model.spec import ClassifierSpec

IGNORED = -1
"""Label of a sample to ignore."""

BATCHES_BEHIND = 2
"""Latest batches on an accelerator that are not fetched yet, so that the host does not wait for it."""

PER_CLASS_LIMIT = 50
"""Number of classes up to which the accuracy of each is logged; the confusion matrix contains all."""

EXACT_CLASSES, EXACT_SAMPLES = 100, 50_000
"""Sizes up to which AUROC is exact; it keeps a probability per sample and class, 20 MB at the limits."""


class TaskMetrics(ABC):
    """Metrics of a task, in host memory.

    Batches on an accelerator are fetched later, so that the host does not wait for it.

    Args:
        classes: class names, in the order of labels.
        metrics: all that is collected, by torchmetrics.

    Attributes:
        thresholds: probability of each class from which it is predicted; None for a task that predicts one class.
    """

    def __init__(self, classes: Sequence[str], metrics: Sequence[Metric]) -> None:
        self.classes = tuple(classes)
        self.thresholds: list[float] | None = None
        self._metrics = tuple(metrics)
        self._pending: deque[tuple[Tensor, ...]] = deque()

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names that :meth:`compute` may return."""

    def update(self, losses: Tensor, probabilities: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Add a batch: losses [B], probabilities [B, C], labels; samples outside ``mask`` are ignored."""
        self._pending.append((losses, probabilities, labels, mask))
        self._process(0 if losses.is_cpu else BATCHES_BEHIND)

    @abstractmethod
    def compute(self) -> Evaluation:
        """Compute everything on all ranks together, the same result on each; undefined metrics are omitted."""

    def reset(self) -> None:
        """Clear all metrics."""
        self._pending.clear()
        for metric in self._metrics:
            metric.reset()

    @abstractmethod
    def choose_thresholds(self) -> None:
        """Choose the thresholds, if the task has any, by the samples collected."""

    def description(self) -> dict[str, Any]:
        """Entries of the network's description in a checkpoint that a validation decides."""
        return {} if self.thresholds is None else {"thresholds": self.thresholds}

    def restore(self, spec: ClassifierSpec) -> None:
        """Load what :meth:`description` saved."""
        self.thresholds = spec.thresholds or self.thresholds

    @abstractmethod
    def _add(self, losses: Tensor, probabilities: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Add a batch that lies in host memory."""

    def _process(self, remaining: int) -> None:
        while len(self._pending) > remaining:
            self._add(*(tensor.cpu() for tensor in self._pending.popleft()))


class EvaluationMetrics(TaskMetrics):
    """Loss, accuracy, macro F1, macro AUROC, accuracy per class and the confusion matrix.

    Above 100 classes or 50,000 samples AUROC is computed from histograms; see
    :class:`~job.model.auroc.BinnedAUROC` for the error bound.

    Args:
        classes: class names, in the order of labels.
        samples: size of the largest data set that is evaluated.
        synchronise: sum over ranks, each of which evaluates its own batches.
    """

    def __init__(self, classes: Sequence[str], *, samples: int = 0, synchronise: bool = True) -> None:
        count = len(classes)
        options: dict[str, Any] = {"ignore_index": IGNORED, "sync_on_compute": synchronise}
        # The default strategy ignores NaN: a network that has diverged would have a finite loss.
        self.loss = MeanMetric(sync_on_compute=synchronise, nan_strategy="disable")
        self.accuracy = MulticlassAccuracy(count, average="micro", **options)
        self.f1 = MulticlassF1Score(count, average=None, **options)
        self.auroc: Metric
        if count > EXACT_CLASSES or samples > EXACT_SAMPLES:
            self.auroc = BinnedAUROC(count, **options)
        else:
            self.auroc = MulticlassAUROC(count, average=None, **options)
        self.confusion = MulticlassConfusionMatrix(count, **options)
        super().__init__(classes, [self.loss, self.accuracy, self.f1, self.auroc, self.confusion])

    @property
    def names(self) -> list[str]:
        """Names that :meth:`compute` may return."""
        per_class = [f"accuracy_of/{name}" for name in self.classes] if len(self.classes) <= PER_CLASS_LIMIT else []
        return ["loss", "accuracy", "f1", "auroc", *per_class]

    def choose_thresholds(self) -> None:
        """There are none: the most probable class is predicted."""

    def _add(self, losses: Tensor, probabilities: Tensor, labels: Tensor, mask: Tensor) -> None:
        self.loss.update(losses[mask])
        labels = torch.where(mask, labels, IGNORED)
        for metric in (self.accuracy, self.f1, self.auroc, self.confusion):
            metric.update(probabilities, labels)

    def compute(self) -> Evaluation:
        """Compute everything on all ranks together, the same result on each.

        A metric that is undefined for these samples is omitted: every metric without samples, the accuracy of a class
        without samples, AUROC of a single class. Macro F1 is the mean over the classes that have samples, macro AUROC
        over those that have positive and negative ones.
        """
        self._process(0)
        confusion: Tensor = self.confusion.compute().to("cpu", torch.int64)
        support, total = confusion.sum(dim=1), int(confusion.sum())
        if not total:
            return Evaluation({}, confusion)
        values = {name: metric.compute().item() for name, metric in (("loss", self.loss), ("accuracy", self.accuracy))}
        # torchmetrics' own mean has a zero for a class without samples that was predicted for others.
        present = (support > 0).float()
        values["f1"] = (present * self.f1.compute() / present.sum()).sum().item()
        defined = (support > 0) & (support < total)
        if defined.any():
            values["auroc"] = self.auroc.compute()[defined].mean().item()
        if len(self.classes) <= PER_CLASS_LIMIT:
            per_class = confusion.diagonal() / support.clamp(min=1)
            for name, value, count in zip(self.classes, per_class.tolist(), support.tolist(), strict=True):
                if count:
                    values[f"accuracy_of/{name}"] = value
        return Evaluation(values, confusion)
