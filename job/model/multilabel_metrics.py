"""Metrics of multi-label validation and test, and the choice of each class's threshold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from job.model.calibrator_fit import fit_platt
from job.model.evaluation import CalibratorFit, Evaluation, SamplePrediction
from job.model.metrics import PER_CLASS_LIMIT, TaskMetrics
from job.model.multilabel import MultilabelTask
from job.model.scores import DEFAULT_THRESHOLD
from job.model.selection import MOST_LABELS


class MultilabelMetrics(TaskMetrics):
    """Loss, mean average precision, micro and macro F1, ECE, average precision per class, and counts per class.

    F1 and counts are those at the thresholds, a probability per class from which the class is predicted. They are 0.5
    until :meth:`choose_thresholds`. Calibration is that of a decision on each class at a probability of 0.5.

    Up to 100 classes and 50,000 samples everything is exact; above, it is computed from histograms, and
    :attr:`Evaluation.errors <job.model.evaluation.Evaluation>` has the error bound of mean average precision.

    Args:
        classes: class names, in the order of labels.
        samples: size of the largest data set that is evaluated.
        synchronise: sum over ranks, each of which evaluates its own batches.
    """

    def __init__(self, classes: Sequence[str], *, samples: int = 0, synchronise: bool = True) -> None:
        super().__init__(classes, [], samples=samples, synchronise=synchronise)
        self.thresholds: list[float] = [DEFAULT_THRESHOLD] * len(classes)

    @property
    def names(self) -> list[str]:
        """Names that :meth:`compute` may return."""
        per_class = [_precision_of(name) for name in self.classes] if len(self.classes) <= PER_CLASS_LIMIT else []
        return ["loss", "mAP", "micro_f1", "macro_f1", "ece", "ece_calibrated", *per_class]

    def choose_thresholds(self) -> None:
        """Choose for each class the threshold of the highest F1 on the samples collected."""
        self._process(0)
        self.thresholds = [ranking.best_threshold() for ranking in self.scores.rankings()]

    def compute(self) -> Evaluation:
        """Compute everything on all ranks together, the same result on each.

        A metric that is undefined for these samples is omitted. Mean average precision and macro F1 are means over the
        classes that have positive samples. The confusion matrix of each class against the rest is
        [[true negatives, false positives], [false negatives, true positives]].
        """
        self._process(0)
        count = len(self.classes)
        confusion, precisions, bounds = np.zeros((count, 2, 2), np.int64), np.zeros(count), np.zeros(count)
        for number, ranking in enumerate(self.scores.rankings()):
            confusion[number] = ranking.confusion(self.thresholds[number])
            precisions[number] = ranking.average_precision()
            bounds[number] = 0.0 if self._is_exact else ranking.average_precision_error()
        present = ~np.isnan(precisions)
        errors = {"mAP": float(bounds[present].mean())} if present.any() else {}
        values: dict[str, float] = {}
        if confusion.any():
            values |= self._metrics_of(confusion, precisions)
        return self._evaluation(values, confusion, errors)

    def _metrics_of(self, confusion: npt.NDArray[np.int64], precisions: npt.NDArray[np.float64]) -> dict[str, float]:
        false_positives, false_negatives, positives = confusion[:, 0, 1], confusion[:, 1, 0], confusion[:, 1, 1]
        values = {}
        present = ~np.isnan(precisions)
        errors = false_positives + false_negatives
        if present.any():
            values["mAP"] = float(precisions[present].mean())
        if positives.sum() + errors.sum():
            values["micro_f1"] = float(2 * positives.sum() / (2 * positives.sum() + errors.sum()))
        if present.any():
            values["macro_f1"] = float((2 * positives / np.maximum(2 * positives + errors, 1))[present].mean())
        if len(self.classes) <= PER_CLASS_LIMIT:
            named = zip(self.classes, precisions.tolist(), present.tolist(), strict=True)
            values |= {_precision_of(name): value for name, value, defined in named if defined}
        return values

    @staticmethod
    def _fitted(logits: Tensor, labels: Tensor) -> CalibratorFit:
        return fit_platt(logits.numpy(), labels.numpy())

    @staticmethod
    def _probabilities(logits: Tensor) -> Tensor:
        return MultilabelTask.probabilities(logits)

    def _count_calibrated(self, logits: Tensor, labels: Tensor) -> None:
        self._calibrated.update(*_decisions(self._probabilities(logits), labels))

    def _add(self, losses: Tensor, probabilities: Tensor, labels: Tensor, samples: Tensor) -> None:
        self.scores.update(probabilities, labels)
        self.calibration.update(*_decisions(probabilities, labels))
        # Which predictions are wrong is only known with the thresholds that are chosen at the end.
        self.selection.add(None, samples, losses, labels, probabilities)

    def _predict(self, sample: Tensor, loss: Tensor, *details: Tensor) -> tuple[SamplePrediction, bool]:
        labels, probabilities = details
        predicted = probabilities >= torch.tensor(self.thresholds)
        certainty = torch.where(predicted, probabilities, 1 - probabilities)
        order = probabilities.argsort(descending=True)
        true, chosen = (tuple(order[each[order]][:MOST_LABELS].tolist()) for each in (labels > 0, predicted))
        prediction = SamplePrediction(int(sample), true, chosen, float(certainty.min()), float(loss))
        return prediction, not torch.equal(predicted, labels > 0)


def _decisions(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of each decision at 0.5, and whether it is right; both [N * C]."""
    correct = (probabilities >= DEFAULT_THRESHOLD) == (labels > 0)
    return torch.maximum(probabilities, 1 - probabilities).flatten(), correct.flatten()


def _precision_of(name: str) -> str:
    return f"average_precision_of/{name}"
