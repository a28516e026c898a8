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
from torchmetrics.utilities import dim_zero_cat

from job.cluster import ranks
from job.model.calibration import BinnedCalibration
from job.model.calibrator import Calibrator
from job.model.calibrator_fit import fit_temperature
from job.model.class_counts import counts_of_cells
from job.model.evaluation import CalibratorFit, Counts, Evaluation, SamplePrediction
from job.model.logit_sample import LogitSample
from job.model.scores import BinnedScores, make_scores
from job.model.selection import SampleSelection
from job.model.spec import ClassifierSpec
from job.model.task import ClassificationTask

BATCHES_BEHIND = 2
"""Latest batches on an accelerator that are not fetched yet, so that the host does not wait for it."""

NUMBERS_AT_ONCE = 1 << 20
BATCH_COST = 1 << 12
"""Batches are added together, when they have so many probabilities: each addition takes 0.5 ms and as long as
:data:`BATCH_COST` further probabilities."""

CELLS_AT_ONCE = 1 << 14
"""Samples of which the confusion matrix is counted together, at least."""

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
        calibrator: of the network, whose effect is measured; None: it has none, or :meth:`fit_calibrator` fits it.
        fits_calibrator: whether logits are kept for :meth:`fit_calibrator`; set before the first batch.
    """

    def __init__(self, classes: Sequence[str], metrics: Sequence[Metric], *, samples: int, synchronise: bool) -> None:
        self.classes = tuple(classes)
        self.thresholds: list[float] | None = None
        # The default strategy ignores NaN: a network that has diverged would have a finite loss.
        self.loss = MeanMetric(sync_on_compute=synchronise, nan_strategy="disable")
        self.scores = make_scores(len(classes), samples, sync_on_compute=synchronise)
        self.calibration = BinnedCalibration(sync_on_compute=synchronise)
        self.selection = SampleSelection()
        self.calibrator: Calibrator | None = None
        self.fits_calibrator = False
        self._calibrated = BinnedCalibration(sync_on_compute=synchronise)
        self._logits = LogitSample(sync_on_compute=synchronise)
        self._fit: CalibratorFit | None = None
        self._metrics = (self.loss, self.scores, self.calibration, self._calibrated, self._logits, *metrics)
        self._synchronise = synchronise
        self._pending: deque[tuple[Tensor, ...]] = deque()
        self._has_logits = False
        self._numbers = 0

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names that :meth:`compute` may return."""

    def update(self, losses: Tensor, probabilities: Tensor, labels: Tensor, mask: Tensor, samples: Tensor) -> None:
        """Add a batch whose logits are not known: no calibration can be fitted or measured.

        Args:
            losses: [B].
            probabilities: [B, C].
            labels: [B], or multi-hot, [B, C].
            mask: samples that count, [B].
            samples: their ids, [B].
        """
        self._append(losses, probabilities, labels, samples, mask, are_logits=False)

    def update_logits(self, losses: Tensor, logits: Tensor, labels: Tensor, mask: Tensor, samples: Tensor) -> None:
        """Add a batch by its logits, [B, num_logits], as the network has them; all else as for :meth:`update`."""
        self._append(losses, logits, labels, samples, mask, are_logits=True)

    def _append(self, *batch: Tensor, are_logits: bool) -> None:
        assert not self._pending or self._has_logits == are_logits, "batches with logits and without are not mixed"
        self._has_logits = are_logits
        self._pending.append(batch)
        self._numbers += batch[1].numel() + BATCH_COST
        if self._numbers >= NUMBERS_AT_ONCE:
            self._process(0 if batch[0].is_cpu else BATCHES_BEHIND)

    @abstractmethod
    def compute(self) -> Evaluation:
        """Compute everything on all ranks together, the same result on each; undefined metrics are omitted."""

    def fit_calibrator(self) -> None:
        """Fit a calibrator to the logits collected, the same on all ranks; :meth:`compute` returns it."""
        assert self.fits_calibrator, "logits are not collected"
        self._process(0)
        if not self.calibration.calibration().counts.any():
            self._fit = CalibratorFit(None, "no validation image with a label could be read", 0)
            return
        logits, labels = self._logits.sorted()
        fit = self._fitted
        self._fit = ranks.from_rank_zero(lambda: fit(logits, labels)) if self._synchronise else fit(logits, labels)

    def reset(self) -> None:
        """Clear all metrics."""
        self._fit = None
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

    @staticmethod
    @abstractmethod
    def _fitted(logits: Tensor, labels: Tensor) -> CalibratorFit:
        """The calibrator of logits [N, num_logits] and labels."""

    @staticmethod
    @abstractmethod
    def _probabilities(logits: Tensor) -> Tensor:
        """Probability of each class, [N, C], from logits [N, num_logits]."""

    @abstractmethod
    def _count_calibrated(self, logits: Tensor, labels: Tensor) -> None:
        """Add calibrated logits, [N, num_logits], of samples in host memory."""

    @abstractmethod
    def _add(self, losses: Tensor, probabilities: Tensor, labels: Tensor, samples: Tensor) -> None:
        """Add samples that lie in host memory."""

    @abstractmethod
    def _predict(self, sample: Tensor, loss: Tensor, *details: Tensor) -> tuple[SamplePrediction, bool]:
        """The prediction of a selected sample, and whether it is wrong."""

    @property
    def _is_exact(self) -> bool:
        """Whether metrics are computed from the scores themselves, and not from histograms."""
        return not isinstance(self.scores, BinnedScores)

    def _evaluation(self, values: dict[str, float], confusion: Counts, errors: dict[str, float]) -> Evaluation:
        """Add to a task's metrics what all tasks have."""
        calibration = self.calibration.calibration()
        if not calibration.counts.any():
            return Evaluation({}, confusion)
        has_few_classes = len(self.classes) <= PER_CLASS_LIMIT
        worst, examples = self.selection.compute(self._predict, synchronise=self._synchronise)
        calibrated = self._fit.after if self._fit is not None else None
        if self.calibrator is not None:
            calibrated = self._calibrated.calibration()
        after = {} if calibrated is None else {"ece_calibrated": calibrated.error}
        return Evaluation(
            {"loss": self.loss.compute().item(), **values, "ece": calibration.error, **after},
            confusion,
            calibration,
            self.scores.histograms() if has_few_classes else self.scores.pooled(),
            worst,
            examples,
            {} if self._is_exact else errors,
            self._fit,
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
        losses, scores, labels, samples = tensors
        self.loss.update(losses)
        self._add(losses, self._probabilities(scores) if self._has_logits else scores, labels, samples)
        if self._has_logits:
            if self.fits_calibrator:
                self._logits.update(scores, labels, samples)
            if self.calibrator is not None:
                self._count_calibrated(self.calibrator.apply(scores), labels)


class ConfusionCounts(Metric):
    """The confusion matrix, and the samples whose class is among the five most probable.

    Of the matrix the cells that are not zero are kept: memory grows with their number, which is at most that of the
    samples, and not with the square of the number of classes. Classes of equal probability are in the order of their
    numbers.
    """

    full_state_update = False
    cells: list[Tensor]
    in_top: Tensor

    def __init__(self, num_classes: int, *, sync_on_compute: bool) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.num_classes = num_classes
        self.add_state("cells", [], dist_reduce_fx="cat")
        self.add_state("in_top", torch.tensor(0), dist_reduce_fx="sum")
        self._unsorted = 0

    def update(self, probabilities: Tensor, labels: Tensor, predicted: Tensor) -> None:
        """Add samples: probabilities float [N, C], labels and predicted classes int64 [N]."""
        if not self.cells:
            self._unsorted = 0
        self.cells.append(torch.stack([labels, predicted, torch.ones_like(labels)], dim=1))
        self._unsorted += len(labels)
        if self._unsorted > max(len(self.cells[0]), CELLS_AT_ONCE):
            self.cells[:] = [_added(torch.cat(self.cells), self.num_classes)]
            self._unsorted = 0
        if self.num_classes > 2 * TOP:
            own, fifth = probabilities.gather(1, labels[:, None]), probabilities.topk(TOP).values[:, -1:]
            self.in_top += (own > fifth).sum() + self._first_of_equal(probabilities, labels, (own == fifth)[:, 0])

    def _first_of_equal(self, probabilities: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
        """Number of ``candidates``, bool [N], that are in the top 5 if equal classes are in the order of numbers."""
        probabilities, labels = probabilities[candidates], labels[candidates, None]
        own = probabilities.gather(1, labels)
        above = (probabilities > own) | (probabilities == own) & (torch.arange(self.num_classes) < labels)
        return (above.sum(dim=1) < TOP).sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Cells of all ranks that are not zero, sorted, int64 [N, 3], and number of samples in the top 5."""
        # On XLA what was summed over ranks lies on the chips.
        cells = dim_zero_cat(self.cells).cpu().long() if len(self.cells) else torch.empty(0, dtype=torch.int64)
        return _added(cells.reshape(-1, 3), self.num_classes), self.in_top.cpu()


def _added(cells: Tensor, num_classes: int) -> Tensor:
    """Rows of (true class, predicted class, count), int64 [N, 3], sorted, with the counts of equal ones added."""
    places, rows = torch.unique(cells[:, 0] * num_classes + cells[:, 1], return_inverse=True)
    counts = torch.zeros_like(places).index_add_(0, rows, cells[:, 2])
    return torch.stack([places // num_classes, places % num_classes, counts], dim=1)


class EvaluationMetrics(TaskMetrics):
    """Loss, accuracy, top-5 accuracy, macro F1, macro AUROC, ECE, accuracy per class and the confusion matrix.

    Up to 100 classes and 50,000 samples AUROC is exact; above, it is computed from histograms, and
    :attr:`Evaluation.errors <job.model.evaluation.Evaluation>` has the error bound of
    :class:`~job.model.scores.BinnedScores`.

    Args:
        classes: class names, in the order of labels.
        samples: size of the largest data set that is evaluated.
        synchronise: sum over ranks, each of which evaluates its own batches.
    """

    def __init__(self, classes: Sequence[str], *, samples: int = 0, synchronise: bool = True) -> None:
        self.counts = ConfusionCounts(len(classes), sync_on_compute=synchronise)
        super().__init__(classes, [self.counts], samples=samples, synchronise=synchronise)

    @property
    def names(self) -> list[str]:
        """Names that :meth:`compute` may return."""
        top = ["top5_accuracy"] if len(self.classes) > 2 * TOP else []
        per_class = [f"accuracy_of/{name}" for name in self.classes] if len(self.classes) <= PER_CLASS_LIMIT else []
        return ["loss", "accuracy", *top, "f1", "auroc", "ece", "ece_calibrated", *per_class]

    def choose_thresholds(self) -> None:
        """There are none: the most probable class is predicted."""

    @staticmethod
    def _fitted(logits: Tensor, labels: Tensor) -> CalibratorFit:
        return fit_temperature(logits.numpy(), labels.numpy())

    @staticmethod
    def _probabilities(logits: Tensor) -> Tensor:
        return ClassificationTask.probabilities(logits)

    def _count_calibrated(self, logits: Tensor, labels: Tensor) -> None:
        confidences, predicted = self._probabilities(logits).max(dim=1)
        self._calibrated.update(confidences, predicted == labels)

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
        cells, in_top = self.counts.compute()
        confusion: Counts = cells.numpy()
        correct, support, predicted = counts_of_cells(confusion, len(self.classes))
        total = int(support.sum())
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        if total:
            values["accuracy"] = int(correct.sum()) / total
            if len(self.classes) > 2 * TOP:
                values["top5_accuracy"] = int(in_top) / total
            present = support > 0
            values["f1"] = float((2 * correct[present] / (support + predicted)[present]).mean())
            defined = [
                (value, 0.0 if self._is_exact else ranking.auroc_error())
                for ranking in self.scores.rankings()
                if not math.isnan(value := ranking.auroc())
            ]
            if defined:
                values["auroc"], errors["auroc"] = (sum(each) / len(defined) for each in zip(*defined, strict=True))
            if len(self.classes) <= PER_CLASS_LIMIT:
                per_class = zip(self.classes, correct.tolist(), support.tolist(), strict=True)
                values |= {f"accuracy_of/{name}": hits / count for name, hits, count in per_class if count}
        return self._evaluation(values, confusion, errors)
