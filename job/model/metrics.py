"""Metrics of validation and test, synchronised over ranks by torchmetrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from job.model.calibration import BinnedCalibration
from job.model.evaluation import Evaluation, SamplePrediction
from job.model.scores import make_scores
from job.model.selection import SampleSelection
from job.model.spec import ClassifierSpec

BATCHES_BEHIND = 2
"""Latest batches on an accelerator that are not fetched yet, so that the host does not wait for it."""

NUMBERS_AT_ONCE = 1 << 16
BATCH_COST = 1 << 12
"""Batches are added together, when they have so many probabilities: each addition takes 0.5 ms and as long as
:data:`BATCH_COST` further probabilities."""

PER_CLASS_LIMIT = 50
"""Number of classes up to which the accuracy of each is logged, and its scores are counted; the confusion matrix
contains all."""

TOP = 5
"""Classes whose prediction counts in top-5 accuracy, which is computed for data of more than twice as many."""


class TaskMetrics(ABC):
    """Metrics of a task, in host memory.

    Batches on an accelerator are fetched later, so that the host does not wait for it.

    Args:
        classes: class names, in the order of labels.
        metrics: what the task collects besides loss, scores, calibration and selected samples.
        samples: size of the largest data set that is evaluated.
        synchronise: sum over ranks, each of which evaluates its own batches.

    Attributes:
        thresholds: probability of each class from which it is predicted; None for a task that predicts one class.
    """

    def __init__(self, classes: Sequence[str], metrics: Sequence[Metric], *, samples: int, synchronise: bool) -> None:
        self.classes = tuple(classes)
        self.thresholds: list[float] | None = None
        # The default strategy ignores NaN: a network that has diverged would have a finite loss.
        self.loss = MeanMetric(sync_on_compute=synchronise, nan_strategy="disable")
        self.scores = make_scores(len(classes), samples, sync_on_compute=synchronise)
        self.calibration = BinnedCalibration(sync_on_compute=synchronise)
        self.selection = SampleSelection()
        self._metrics = (self.loss, self.scores, self.calibration, *metrics)
        self._synchronise = synchronise
        self._pending: deque[tuple[Tensor, ...]] = deque()
        self._numbers = 0

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names that :meth:`compute` may return."""

    def update(self, losses: Tensor, probabilities: Tensor, labels: Tensor, mask: Tensor, samples: Tensor) -> None:
        """Add a batch: losses [B], probabilities [B, C], labels, sample ids; samples outside ``mask`` are ignored."""
        self._pending.append((losses, probabilities, labels, samples, mask))
        self._numbers += probabilities.numel() + BATCH_COST
        if self._numbers >= NUMBERS_AT_ONCE:
            self._process(0 if losses.is_cpu else BATCHES_BEHIND)

    @abstractmethod
    def compute(self) -> Evaluation:
        """Compute everything on all ranks together, the same result on each; undefined metrics are omitted."""

    def reset(self) -> None:
        """Clear all metrics."""
        self._pending.clear()
        self._numbers = 0
        self.selection.clear()
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
    def _add(self, losses: Tensor, probabilities: Tensor, labels: Tensor, samples: Tensor) -> None:
        """Add samples that lie in host memory."""

    @abstractmethod
    def _predict(self, sample: Tensor, loss: Tensor, *details: Tensor) -> tuple[SamplePrediction, bool]:
        """The prediction of a selected sample, and whether it is wrong."""

    def _evaluation(self, values: dict[str, float], confusion: Tensor) -> Evaluation:
        """Add to a task's metrics what all tasks have."""
        calibration = self.calibration.calibration()
        if not calibration.counts.any():
            return Evaluation({}, confusion)
        scores = self.scores.histograms()
        worst, examples = self.selection.compute(self._predict, synchronise=self._synchronise)
        return Evaluation(
            {"loss": self.loss.compute().item(), **values, "ece": calibration.error},
            confusion,
            calibration,
            scores if len(self.classes) <= PER_CLASS_LIMIT else scores.pooled(),
            worst,
            examples,
        )

    def _process(self, remaining: int) -> None:
        count = len(self._pending) - remaining
        if count <= 0:
            return
        batches = [self._pending.popleft() for _ in range(count)]
        self._numbers = 0
        *tensors, mask = (torch.cat([part.cpu() for part in parts]) for parts in zip(*batches, strict=True))
        if not mask.all():
            tensors = [tensor[mask] for tensor in tensors]
        self.loss.update(tensors[0])
        self._add(*tensors)


class ClassCounts(Metric):
    """The confusion matrix, and the samples whose class is among the five most probable.

    Classes of equal probability are in the order of their numbers.
    """

    full_state_update = False
    confusion: Tensor
    in_top: Tensor

    def __init__(self, num_classes: int, *, sync_on_compute: bool) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.num_classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("in_top", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor, predicted: Tensor) -> None:
        """Add samples: probabilities float [N, C], labels and predicted classes int64 [N]."""
        self.confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
        if self.num_classes > 2 * TOP:
            own = probabilities.gather(1, labels[:, None])
            earlier = torch.arange(self.num_classes) < labels[:, None]
            above = (probabilities > own) | (probabilities == own) & earlier
            self.in_top += (above.sum(dim=1) < TOP).sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Confusion matrix int64 [C, C], and number of samples in the top 5, of all ranks."""
        # On XLA what was summed over ranks lies on the chips.
        return self.confusion.cpu(), self.in_top.cpu()


class EvaluationMetrics(TaskMetrics):
    """Loss, accuracy, top-5 accuracy, macro F1, macro AUROC, ECE, accuracy per class and the confusion matrix.

    Above 100 classes or 50,000 samples AUROC is computed from histograms; see :class:`~job.model.scores.BinnedScores`
    for the error bound.

    Args:
        classes: class names, in the order of labels.
        samples: size of the largest data set that is evaluated.
        synchronise: sum over ranks, each of which evaluates its own batches.
    """

    def __init__(self, classes: Sequence[str], *, samples: int = 0, synchronise: bool = True) -> None:
        self.counts = ClassCounts(len(classes), sync_on_compute=synchronise)
        super().__init__(classes, [self.counts], samples=samples, synchronise=synchronise)

    @property
    def names(self) -> list[str]:
        """Names that :meth:`compute` may return."""
        top = ["top5_accuracy"] if len(self.classes) > 2 * TOP else []
        per_class = [f"accuracy_of/{name}" for name in self.classes] if len(self.classes) <= PER_CLASS_LIMIT else []
        return ["loss", "accuracy", *top, "f1", "auroc", "ece", *per_class]

    def choose_thresholds(self) -> None:
        """There are none: the most probable class is predicted."""

    def _add(self, losses: Tensor, probabilities: Tensor, labels: Tensor, samples: Tensor) -> None:
        confidences, predicted = probabilities.max(dim=1)
        correct = predicted == labels
        self.counts.update(probabilities, labels, predicted)
        self.scores.update(probabilities, labels)
        self.calibration.update(confidences, correct)
        self.selection.add(~correct, samples, losses, labels, predicted, confidences)

    def _predict(self, sample: Tensor, loss: Tensor, *details: Tensor) -> tuple[SamplePrediction, bool]:
        label, predicted, confidence = details
        true, chosen = (int(label),), (int(predicted),)
        return SamplePrediction(int(sample), true, chosen, float(confidence), float(loss)), true != chosen

    def compute(self) -> Evaluation:
        """Compute everything on all ranks together, the same result on each.

        A metric that is undefined for these samples is omitted: every metric without samples, the accuracy of a class
        without samples, AUROC of a single class. Macro F1 is the mean over the classes that have samples, macro AUROC
        over those that have positive and negative ones.
        """
        self._process(0)
        confusion, in_top = self.counts.compute()
        support, correct, total = confusion.sum(dim=1), confusion.diagonal(), int(confusion.sum())
        values: dict[str, float] = {}
        if total:
            values["accuracy"] = int(correct.sum()) / total
            if len(self.classes) > 2 * TOP:
                values["top5_accuracy"] = int(in_top) / total
            present = support > 0
            values["f1"] = (2 * correct / (support + confusion.sum(dim=0)))[present].double().mean().item()
            auroc = [value for ranking in self.scores.rankings() if not math.isnan(value := ranking.auroc())]
            if auroc:
                values["auroc"] = sum(auroc) / len(auroc)
            if len(self.classes) <= PER_CLASS_LIMIT:
                per_class = zip(self.classes, correct.tolist(), support.tolist(), strict=True)
                values |= {f"accuracy_of/{name}": hits / count for name, hits, count in per_class if count}
        return self._evaluation(values, confusion)
