"""Result of a validation or test: metrics, confusion matrix, calibration, curves and single predictions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from job.model.calibrator import Calibrator

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CALIBRATION_BINS = 15
"""Bins of equal width in confidence, as in Guo et al., arXiv:1706.04599."""

MOST_IMAGES = 64
"""Samples of each kind whose predictions are kept to be shown: the worst errors, and the examples."""


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, in :data:`CALIBRATION_BINS` bins of equal width in confidence.

    The confidence of a prediction is the probability of the predicted class. Of several labels each decision on a class
    counts, which is made at 0.5, with the probability of that decision.

    Attributes:
        counts: predictions per bin, int64 [bins].
        confidence: sum of confidences per bin, float64 [bins].
        correct: correct predictions per bin, int64 [bins].
    """

    counts: Counts
    confidence: Floats
    correct: Counts

    @property
    def error(self) -> float:
        """Expected calibration error (ECE), from 0 to 1; NaN without predictions."""
        total = self.counts.sum()
        return float(np.abs(self.confidence - self.correct).sum() / total) if total else float("nan")


@dataclass(frozen=True)
class CalibratorFit:
    """The calibrator of a network, or why its probabilities stay as they are.

    Attributes:
        calibrator: fitted to all of the samples. Where none helps, one of temperature 1, or None for several labels;
            None, too, where none could be fitted.
        reason: why probabilities stay as they are; empty where they change, else the end of a sentence.
        samples: validation samples that were used.
        before: confidence against accuracy of these samples; None where it was not measured.
        after: the same with calibrated confidences, each by a calibrator that was fitted to the other samples.
    """

    calibrator: Calibrator | None
    reason: str
    samples: int
    before: Calibration | None = None
    after: Calibration | None = None

    def without(self, reason: str) -> CalibratorFit:
        """The same, with a reason why probabilities stay as they are."""
        return replace(self, reason=reason)

    def with_calibrator(self, calibrator: Calibrator, after: Calibration) -> CalibratorFit:
        """The same, with a calibrator and its effect."""
        return replace(self, calibrator=calibrator, after=after)


@dataclass(frozen=True)
class ScoreHistograms:
    """Histograms of each class's scores, from which PR and ROC curves follow.

    Attributes:
        positives: samples of the class per bin, int64 [C, bins]; [1, bins] of all classes together.
        negatives: samples of other classes per bin, of the same shape.
        lowest: lowest probability of each bin, float64 [bins], ascending.
    """

    positives: Counts
    negatives: Counts
    lowest: Floats

    def pooled(self) -> ScoreHistograms:
        """The scores of all classes together, whose curves are called micro-averaged."""
        return ScoreHistograms(self.positives.sum(0, keepdims=True), self.negatives.sum(0, keepdims=True), self.lowest)


@dataclass(frozen=True)
class SamplePrediction:
    """What the model predicts for one sample.

    Attributes:
        sample: sample id in the index of the part.
        labels: true classes; one, or up to 20 where samples have several labels, the most probable first.
        predicted: predicted classes, of the same kind.
        confidence: probability of the predicted class; of several labels, that of the least certain decision.
        loss: of the sample.
    """

    sample: int
    labels: tuple[int, ...]
    predicted: tuple[int, ...]
    confidence: float
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """Result of a validation or test, the same on every rank.

    Attributes:
        metrics: values by name; undefined ones are omitted.
        confusion: cells of the confusion matrix that are not zero, int64 [N, 3]: rows of (true class, predicted class,
            count), sorted; of several labels one matrix per class, int64 [C, 2, 2].
        calibration: confidence against accuracy; None without samples.
        scores: histograms of scores, those of all classes together above 50 classes; None without samples.
        worst: wrong predictions of the highest loss, the worst first; at most 64. Of several labels those that are
            wrong of the 64 samples with the highest loss.
        examples: predictions of at most 64 samples, in the order of sample ids. They are evenly spread over the data,
            and the same in each validation of the same samples.
        errors: largest possible difference from the exact value, of the metrics that are computed from histograms of
            the scores; empty where all metrics are exact.
        calibrator_fit: the calibration that follows from this validation; None where none was asked for.
    """

    metrics: dict[str, float]
    confusion: Counts
    calibration: Calibration | None = None
    scores: ScoreHistograms | None = None
    worst: tuple[SamplePrediction, ...] = ()
    examples: tuple[SamplePrediction, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)
    calibrator_fit: CalibratorFit | None = None
