"""Metrics of multi-label validation and test, and the choice of each class's threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat

from job.model.auroc import BINS, LOG_ODDS, histogram_bins
from job.model.evaluation import Evaluation
from job.model.metrics import EXACT_CLASSES, EXACT_SAMPLES, PER_CLASS_LIMIT, TaskMetrics

DEFAULT_THRESHOLD = 0.5
"""Threshold of a class that validation has no positive sample of."""

Floats = npt.NDArray[np.float64]


class Ranking(NamedTuple):
    """The samples of one class by descending score, in groups of equal scores or of neighbouring ones.

    Attributes:
        positives: positive samples per group.
        negatives: negative samples per group.
        lowest: lowest score of each group.
        highest: highest score of each group.
    """

    positives: Floats
    negatives: Floats
    lowest: Floats
    highest: Floats

    def average_precision(self) -> float:
        """Sum over the groups of (recall gained * precision), as scikit-learn's; NaN without positive samples."""
        positives, predicted = self.positives.cumsum(), (self.positives + self.negatives).cumsum()
        total = self.positives.sum()
        return float((self.positives * positives / predicted).sum() / total) if total else float("nan")

    def best_threshold(self) -> float:
        """The threshold of the highest F1, in the middle between two groups; the default without positive samples."""
        total = self.positives.sum()
        if not total:
            return DEFAULT_THRESHOLD
        positives, predicted = self.positives.cumsum(), (self.positives + self.negatives).cumsum()
        best = int(np.argmax(2 * positives / (predicted + total)))
        below = self.highest[best + 1] if best + 1 < len(self.highest) else 0.0
        return float((self.lowest[best] + below) / 2)

    def confusion(self, threshold: float) -> list[list[int]]:
        """[[true negatives, false positives], [false negatives, true positives]] at a threshold.

        A group that a threshold of other data divides is taken whole: predicted if its middle is.
        """
        predicted = (self.lowest + self.highest) / 2 >= threshold
        positives, negatives = int(self.positives[predicted].sum()), int(self.negatives[predicted].sum())
        return [
            [int(self.negatives.sum()) - negatives, negatives],
            [int(self.positives.sum()) - positives, positives],
        ]


class CollectedScores(Metric):
    """All probabilities and labels, from which metrics are exact."""

    full_state_update = False
    probabilities: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, *, sync_on_compute: bool) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.num_classes = num_classes
        for name in ("probabilities", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add samples: probabilities float [N, C], labels uint8 [N, C]."""
        self.probabilities.append(probabilities)
        self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Probabilities and labels of all ranks."""
        return dim_zero_cat(self.probabilities), dim_zero_cat(self.labels)

    def rankings(self) -> Iterator[Ranking]:
        """The ranking of each class, in groups of equal scores."""
        probabilities, labels = (tensor.reshape(-1, self.num_classes).numpy() for tensor in self.compute())
        for scores, positive in zip(probabilities.T, labels.T, strict=True):
            groups, members = np.unique(-scores.astype(np.float64), return_inverse=True)
            positives = np.bincount(members[positive > 0], minlength=len(groups)).astype(np.float64)
            negatives = np.bincount(members[positive == 0], minlength=len(groups)).astype(np.float64)
            yield Ranking(positives, negatives, -groups, -groups)


class BinnedScores(Metric):
    """Histograms of the log-odds of positive and negative samples, whose memory does not grow with their number.

    A bin counts as a group of equal scores. So the average precision of a class differs from the exact one by at most
    the mean, over the positive samples, of the share that the sample's bin has of all samples scored as high or higher:
    about 1e-3 unless most scores of a class are equal. Thresholds lie between bins, 1/64 apart in log-odds.
    """

    full_state_update = False
    positives: Tensor
    negatives: Tensor

    def __init__(self, num_classes: int, *, sync_on_compute: bool) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.num_classes = num_classes
        for name in ("positives", "negatives"):
            self.add_state(name, torch.zeros(num_classes, BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add samples: probabilities float [N, C], labels uint8 [N, C]."""
        bins = histogram_bins(probabilities.float()) + torch.arange(self.num_classes) * BINS
        size = self.num_classes * BINS
        self.positives += torch.bincount(bins[labels > 0], minlength=size).view_as(self.positives)
        self.negatives += torch.bincount(bins[labels == 0], minlength=size).view_as(self.negatives)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Histograms of all ranks, int64 [C, BINS]."""
        return self.positives, self.negatives

    def rankings(self) -> Iterator[Ranking]:
        """The ranking of each class, in groups of one bin."""
        edges = 1 / (1 + np.exp(-np.linspace(-LOG_ODDS, LOG_ODDS, BINS + 1)))
        lowest, highest = edges[:-1][::-1], edges[1:][::-1]
        for counts in zip(*(tensor.numpy() for tensor in self.compute()), strict=True):
            positives, negatives = (each[::-1].astype(np.float64) for each in counts)
            filled = positives + negatives > 0
            yield Ranking(positives[filled], negatives[filled], lowest[filled], highest[filled])


class MultilabelMetrics(TaskMetrics):
    """Loss, mean average precision, micro and macro F1, average precision per class, and counts per class.

    F1 and counts are those at the thresholds, a probability per class from which the class is predicted. They are 0.5
    until :meth:`choose_thresholds`.

    Above 100 classes or 50,000 samples everything is computed from histograms; see :class:`BinnedScores` for the error
    bound.

    Args:
        classes: class names, in the order of labels.
        samples: size of the largest data set that is evaluated.
        synchronise: sum over ranks, each of which evaluates its own batches.
    """

    def __init__(self, classes: Sequence[str], *, samples: int = 0, synchronise: bool = True) -> None:
        # The default strategy ignores NaN: a network that has diverged would have a finite loss.
        self.loss = MeanMetric(sync_on_compute=synchronise, nan_strategy="disable")
        exact = len(classes) <= EXACT_CLASSES and samples <= EXACT_SAMPLES
        kind = CollectedScores if exact else BinnedScores
        self.scores: CollectedScores | BinnedScores = kind(len(classes), sync_on_compute=synchronise)
        super().__init__(classes, [self.loss, self.scores])
        self.thresholds: list[float] = [DEFAULT_THRESHOLD] * len(classes)

    @property
    def names(self) -> list[str]:
        """Names that :meth:`compute` may return."""
        per_class = [_precision_of(name) for name in self.classes] if len(self.classes) <= PER_CLASS_LIMIT else []
        return ["loss", "mAP", "micro_f1", "macro_f1", *per_class]

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
        confusion, precisions = np.zeros((len(self.classes), 2, 2), np.int64), np.zeros(len(self.classes))
        for number, ranking in enumerate(self.scores.rankings()):
            confusion[number] = ranking.confusion(self.thresholds[number])
            precisions[number] = ranking.average_precision()
        if not confusion.any():
            return Evaluation({}, torch.from_numpy(confusion))
        false_positives, false_negatives, positives = confusion[:, 0, 1], confusion[:, 1, 0], confusion[:, 1, 1]
        values = {"loss": self.loss.compute().item()}
        present = ~np.isnan(precisions)
        wrong = false_positives + false_negatives
        if present.any():
            values["mAP"] = float(precisions[present].mean())
        if positives.sum() + wrong.sum():
            values["micro_f1"] = float(2 * positives.sum() / (2 * positives.sum() + wrong.sum()))
        if present.any():
            values["macro_f1"] = float((2 * positives / np.maximum(2 * positives + wrong, 1))[present].mean())
        if len(self.classes) <= PER_CLASS_LIMIT:
            named = zip(self.classes, precisions.tolist(), present.tolist(), strict=True)
            values |= {_precision_of(name): value for name, value, defined in named if defined}
        return Evaluation(values, torch.from_numpy(confusion))

    def _add(self, losses: Tensor, probabilities: Tensor, labels: Tensor, mask: Tensor) -> None:
        self.loss.update(losses[mask])
        self.scores.update(probabilities[mask], labels[mask])


def _precision_of(name: str) -> str:
    return f"average_precision_of/{name}"
