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


class ROC(NamedTuple):
    """A ROC curve.

    Attributes:
        false_positive_rate: float64 [points], ascending from 0 to 1.
        true_positive_rate: float64 [points], ascending from 0 to 1.
    """

    false_positive_rate: Floats
    true_positive_rate: Floats

    @property
    def area(self) -> float:
        """Area under the curve (AUROC)."""
        return float(np.trapezoid(self.true_positive_rate, self.false_positive_rate))


def roc_curves(scores: ScoreHistograms) -> dict[int, ROC]:
    """The curve of each class that has both positive and negative samples, by class number."""
    curves = {}
    for number, (positives, negatives) in enumerate(zip(scores.positives, scores.negatives, strict=True)):
        if positives.any() and negatives.any():
            used = (positives + negatives) > 0
            rates = (np.cumsum(counts[used][::-1]) / counts.sum() for counts in (negatives, positives))
            false, true = (np.concatenate([[0.0], rate]) for rate in rates)
            curves[number] = ROC(false, true)
    return curves


def _at_or_above(counts: Counts) -> Floats:
    """Samples in each bin and those above, float64 [C, bins + 1]; none above the last."""
    above = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1].astype(np.float64)
    return np.concatenate([above, np.zeros((len(counts), 1))], axis=1)
