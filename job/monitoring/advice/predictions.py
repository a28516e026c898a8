"""Advice from the predictions of a validation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from job.model.class_counts import counts_of_cells
from job.model.evaluation import Evaluation
from job.monitoring.advice.context import Advice, Context
from job.monitoring.advice.statistics import SIGMAS, bounds
from job.monitoring.history import ValidationRecord
from job.process.terminal import escape

MATURE_VALIDATIONS = 3
"""Validations before which a model is not judged by its predictions: it has just begun."""

POOR_CALIBRATION = 0.10
"""Expected calibration error from which on confidences mislead; of the networks of Guo et al. (arXiv:1706.04599),
table 1, the worst have 0.16, and all have less than 0.02 after temperature scaling."""

FEWEST_PREDICTIONS = 50
"""Predictions from which on calibration is judged: of fewer, an error of 0.10 is less than five images."""

CONFIDENT = 0.9
"""Confidence of a prediction from which on its reader takes it for certain."""

CHANCE = 1e-4
"""Probability by chance, over all classes; below it, a class that is never predicted is reported."""

IMBALANCED = 10
"""Ratio of class sizes from which on a data set is long-tailed (Cui et al., arXiv:1901.05555, use 10 to 200)."""

FAR_BELOW = 0.10
"""Difference in recall of rare and other classes, reported from this value on if it is significant."""

NAMED, LONGEST_NAME = 5, 60
"""Classes that a message names, and characters of a name."""


def calibration(history: Sequence[ValidationRecord], evaluation: Evaluation, context: Context) -> Advice | None:
    """Confidence and accuracy differ by more than chance explains."""
    measured = evaluation.calibration
    if measured is None or len(history) < MATURE_VALIDATIONS:
        return None
    total = int(measured.counts.sum())
    if total < FEWEST_PREDICTIONS:
        return None
    error, before = measured.error, history[-2].metrics.get("val/ece")
    if error < POOR_CALIBRATION or (before is not None and before < POOR_CALIBRATION):
        return None
    # Of a calibrated model, a bin of n predictions at confidence c has |Σ confidence - correct| ~ |N(0, n c (1 - c))|.
    filled = measured.counts > 0
    confidence = measured.confidence[filled] / measured.counts[filled]
    variance = np.clip(confidence * (1 - confidence), 0, None) * measured.counts[filled]
    expected = math.sqrt(2 / math.pi) * float(np.sqrt(variance).sum()) / total
    deviation = math.sqrt((1 - 2 / math.pi) * float(variance.sum())) / total
    if error <= expected + SIGMAS * deviation:
        return None
    mean, accuracy = float(measured.confidence.sum()) / total, float(measured.correct.sum()) / total
    likely = bounds(accuracy, total)
    smooths = context.label_smoothing > 0 or context.mixes_images
    if mean > likely.high:
        top = confidence >= CONFIDENT
        count = int(measured.counts[filled][top].sum())
        wrong = count - int(measured.correct[filled][top].sum())
        certain = f" Of {count:,} predictions with a confidence of {CONFIDENT:.0%} or more, {wrong:,} are wrong."
        return Advice(
            "calibration",
            f"The model is overconfident: its mean confidence is {mean:.3f}, its accuracy {accuracy:.3f} (ECE "
            f"{error:.3f} over {total:,} predictions).{certain if wrong else ''}",
            "Stop earlier by --early_stopping 5, or train with more weight decay."
            if smooths
            else "Train with --model.label_smoothing 0.1, or stop earlier by --early_stopping 5.",
        )
    if mean >= likely.low or not smooths:
        return None  # without smoothing it still learns, and is underconfident
    return Advice(
        "calibration",
        f"The model is underconfident: its mean confidence is {mean:.3f}, its accuracy {accuracy:.3f} (ECE "
        f"{error:.3f} over {total:,} predictions).",
        "Lower --model.label_smoothing, --model.mixup or --model.cutmix, if probabilities matter.",
    )


def never_predicted(
    history: Sequence[ValidationRecord], evaluation: Evaluation, classes: Sequence[str], context: Context
) -> Advice | None:
    """Classes with validation samples that the model predicts for no sample at all."""
    if len(history) < MATURE_VALIDATIONS:
        return None
    missing = np.flatnonzero(_is_never_predicted(evaluation, len(classes)))
    if not len(missing):
        return None
    _, support, _ = counts_of_cells(evaluation.confusion, len(classes))
    named = ", ".join(
        f"{escape(classes[number])[:LONGEST_NAME]} ({support[number]:,})" for number in missing[:NAMED].tolist()
    )
    more = f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else ""
    counts = np.asarray(context.class_counts)
    rare = len(counts) == len(support) and bool((counts[missing] < counts.mean() / 2).all())
    return Advice(
        "never_predicted",
        f"{len(missing):,} of {len(classes):,} classes are never predicted in validation: {named}{more} (samples in "
        "brackets).",
        "They are rare in training: draw them more often by --data.sampling balanced, or weigh them by "
        "--model.class_weights balanced."
        if rare and not context.is_balanced
        else "Look in the confusion matrix which classes they are taken for, and whether their labels are right.",
    )


def imbalance(
    history: Sequence[ValidationRecord], evaluation: Evaluation, classes: Sequence[str], context: Context
) -> Advice | None:
    """Classes that are rare in training are recognised far less often than others."""
    counts = np.asarray(context.class_counts, np.int64)
    correct, support, _ = counts_of_cells(evaluation.confusion, len(classes))
    if len(history) < MATURE_VALIDATIONS or context.is_balanced or len(counts) != len(support) or not len(counts):
        return None
    is_rare = counts * IMBALANCED <= counts.max()
    rare, others = is_rare & ~_is_never_predicted(evaluation, len(classes)) & (support > 0), ~is_rare & (support > 0)
    if not rare.any() or not others.any():
        return None
    recalls = [(int(correct[part].sum()), int(support[part].sum())) for part in (rare, others)]
    (low_share, low_count), (high_share, high_count) = ((hits / count, count) for hits, count in recalls)
    significant = bounds(low_share, low_count).high < bounds(high_share, high_count).low
    if high_share - low_share < FAR_BELOW or not significant:
        return None
    worst = np.flatnonzero(rare)[np.argsort(counts[rare], kind="stable")[:NAMED]].tolist()
    return Advice(
        "imbalance",
        f"{int(is_rare.sum()):,} of {len(classes):,} classes have a tenth of the largest one's images or fewer, and "
        f"{low_share:.0%} of theirs are recognised, of the others' {high_share:.0%}: "
        f"{', '.join(f'{escape(classes[number])[:LONGEST_NAME]} ({counts[number]:,})' for number in worst)}.",
        "Draw them more often by --data.sampling balanced, or weigh them by --model.class_weights balanced.",
    )


def _is_never_predicted(evaluation: Evaluation, classes: int) -> npt.NDArray[np.bool_]:
    """Classes that are never predicted, which one of half the mean recall would hardly be by chance; bool [C]."""
    correct, support, predicted = counts_of_cells(evaluation.confusion, classes)
    recall = int(correct.sum()) / max(int(support.sum()), 1)
    by_chance = (1 - recall / 2) ** support.astype(np.float64)
    missing: npt.NDArray[np.bool_] = (predicted == 0) & (support > 0) & (by_chance * len(support) < CHANCE)
    return missing
