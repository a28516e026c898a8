"""PR and ROC curves from histograms of scores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from job.model.evaluation import Counts, Floats, ScoreHistograms

THRESHOLDS = 101
"""Thresholds of a PR curve, evenly spaced from 0 to 1, as TensorBoard's plugin has it."""


class PRCounts(NamedTuple):
    """Decisions on the samples at each threshold, and what follows from them; float64 [C, thresholds] each."""

    true_positives: Floats
    false_positives: Floats
    true_negatives: Floats
    false_negatives: Floats
    precision: Floats
    recall: Floats


def pr_counts(scores: ScoreHistograms, thresholds: int = THRESHOLDS) -> PRCounts:
    """Decisions at evenly spaced thresholds, by class.

    A bin that a threshold divides counts as below it. Where nothing is predicted, precision is 0.
    """
    first = np.searchsorted(scores.lowest, np.linspace(0, 1, thresholds), side="left")
    first[0] = 0  # the lowest bin begins at 0, or is the lowest score there is
    true_positives, false_positives = (
        _at_or_above(counts)[:, first] for counts in (scores.positives, scores.negatives)
    )
    positives, negatives = (
        counts.sum(1, keepdims=True).astype(np.float64) for counts in (scores.positives, scores.negatives)
    )
    return PRCounts(
        true_positives,
        false_positives,
        negatives - false_positives,
        positives - true_positives,
        true_positives / np.maximum(true_positives + false_positives, 1),
        true_positives / np.maximum(positives, 1),
    )


class Curves(NamedTuple):
    """PR and ROC curve of a class against the rest, from the highest threshold to the lowest.

    Attributes:
        recall: float64 [points], ascending from 0 to 1; the true positive rate of the ROC curve.
        precision: float64 [points].
        false_positive_rate: float64 [points], ascending from 0 to 1; zeros where all samples are of the class.
        average_precision: area under the PR curve.
        auroc: area under the ROC curve; None where all samples are of the class.
    """

    recall: Floats
    precision: Floats
    false_positive_rate: Floats
    average_precision: float
    auroc: float | None


def curves_of_classes(scores: ScoreHistograms) -> dict[int, Curves]:
    """The curves of each class that has samples, by class number."""
    return {
        number: _curves(positives, negatives)
        for number, (positives, negatives) in enumerate(zip(scores.positives, scores.negatives, strict=True))
        if positives.any()
    }


def _curves(positives: Counts, negatives: Counts) -> Curves:
    """The curves from histograms of scores in ascending order."""
    filled = (positives + negatives > 0)[::-1]
    hits, false_alarms = positives[::-1][filled].cumsum(), negatives[::-1][filled].cumsum()
    recall, precision = hits / hits[-1], hits / (hits + false_alarms)
    has_negatives = bool(false_alarms[-1])
    false_positive_rate = false_alarms / false_alarms[-1] if has_negatives else np.zeros(len(hits))
    average_precision = float((np.diff(recall, prepend=0.0) * precision).sum())
    recall, precision, false_positive_rate = (
        np.concatenate([[first], values])
        for first, values in ((0.0, recall), (precision[0], precision), (0.0, false_positive_rate))
    )
    auroc = min(float(np.trapezoid(recall, false_positive_rate)), 1.0) if has_negatives else None
    return Curves(recall, precision, false_positive_rate, min(average_precision, 1.0), auroc)


def _at_or_above(counts: Counts) -> Floats:
    """Samples in each bin and those above, float64 [C, bins + 1]; none above the last."""
    above = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1].astype(np.float64)
    return np.concatenate([above, np.zeros((len(counts), 1))], axis=1)
