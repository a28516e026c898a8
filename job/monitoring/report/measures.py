"""Figures of one validation, as the report lists them: per class, calibration, curves, worst errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from job.checkpoint.confusion import Cells
from job.model import evaluation as measured
from job.model.class_counts import counts_of_cells
from job.model.selective import REPORTED_PRECISIONS
from job.monitoring.drawing.curves import curves_of_classes
from job.monitoring.report.content import (
    MOST_CLASSES,
    MOST_CURVES,
    MOST_PAIRS,
    Calibration,
    CalibrationBin,
    CalibratorSummary,
    ClassMetrics,
    ConfusedPair,
    Curves,
    EvaluationResult,
    OperatingPoint,
    WorstError,
)

CURVE_POINTS = 60
"""Points of a PR or ROC curve."""

Floats = npt.NDArray[np.float64]


def per_class(cells: Cells, classes: Sequence[str]) -> list[ClassMetrics]:
    """Precision, recall and F1 of each class, in the order of classes.

    Above :data:`~job.monitoring.report.content.MOST_CLASSES` classes, those of the lowest F1, the lowest first.

    Args:
        cells: confusion matrix as rows of (true class, predicted class, count), or int64 [C, 2, 2].
        classes: names.
    """
    correct, support, predicted = counts_of_cells(cells, len(classes))
    listed = [
        ClassMetrics(
            name=name,
            precision=_ratio(hits, guesses),
            recall=_ratio(hits, occurrences),
            f1=_ratio(2 * hits, occurrences + guesses),
            support=occurrences,
            predicted=guesses,
        )
        for name, hits, occurrences, guesses in zip(
            classes, correct.tolist(), support.tolist(), predicted.tolist(), strict=True
        )
    ]
    if len(listed) <= MOST_CLASSES:
        return listed
    return sorted(listed, key=lambda each: math.inf if each.f1 is None else each.f1)[:MOST_CLASSES]


def most_confused(cells: Cells, classes: Sequence[str]) -> list[ConfusedPair]:
    """The pairs of different classes with the highest counts; none where samples have several labels."""
    if cells.ndim == 3:
        return []
    _, support, _ = counts_of_cells(cells, len(classes))
    wrong = cells[cells[:, 0] != cells[:, 1]]
    wrong = wrong[np.argsort(-wrong[:, 2], kind="stable")[:MOST_PAIRS]]
    return [
        ConfusedPair(classes[label], classes[guess], count, min(count / int(support[label]), 1.0))
        for label, guess, count in wrong.tolist()
    ]


def result_of(
    evaluation: measured.Evaluation, global_step: int, classes: Sequence[str], uri_of: Callable[[int], str], most: int
) -> EvaluationResult:
    """The report's entry of a validation.

    Args:
        evaluation: of the validation.
        global_step: at which it was done.
        classes: names.
        uri_of: URI of a validation sample by its id.
        most: worst errors to list.
    """
    calibration, scores = evaluation.calibration, evaluation.scores
    return EvaluationResult(
        global_step=global_step,
        calibration=None if calibration is None else _calibration(calibration),
        curves=[] if scores is None or len(classes) > MOST_CURVES else _curves(scores, classes),
        worst_errors=[
            WorstError(
                sample=each.sample,
                uri=uri_of(each.sample),
                labels=[classes[label] for label in each.labels],
                predicted=[classes[label] for label in each.predicted],
                confidence=_finite(each.confidence),
                loss=_finite(each.loss),
            )
            for each in evaluation.worst[:most]
        ],
        metric_errors=dict(evaluation.errors),
        calibrator=None if evaluation.calibrator_fit is None else _calibrator(evaluation.calibrator_fit),
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _calibrator(fit: measured.CalibratorFit) -> CalibratorSummary:
    curve = None if fit.calibrator is None else fit.calibrator.risk_coverage
    calibrator = None if fit.reason else fit.calibrator
    points = [] if curve is None else [(precision, curve.at(precision)) for precision in REPORTED_PRECISIONS]
    return CalibratorSummary(
        method=None if calibrator is None else calibrator.method,
        reason=fit.reason,
        samples=fit.samples,
        temperature=None if calibrator is None or calibrator.method != "temperature" else calibrator.temperature,
        classes=0 if calibrator is None else calibrator.calibrated_classes,
        error_before=None if fit.before is None else _finite(fit.before.error),
        after=None if fit.after is None else _calibration(fit.after),
        selective=[
            OperatingPoint(precision, None, None)
            if point is None
            else OperatingPoint(precision, point.threshold, point.coverage)
            for precision, point in points
        ],
    )


def _calibration(calibration: measured.Calibration) -> Calibration:
    edges = np.linspace(0, 1, len(calibration.counts) + 1).tolist()
    rows = zip(calibration.counts.tolist(), calibration.confidence.tolist(), calibration.correct.tolist(), strict=True)
    return Calibration(
        error=_finite(calibration.error),
        bins=[
            CalibrationBin(
                lowest=edges[number],
                highest=edges[number + 1],
                count=count,
                confidence=confidence / count if count else None,
                accuracy=correct / count if count else None,
            )
            for number, (count, confidence, correct) in enumerate(rows)
        ],
    )


def _curves(scores: measured.ScoreHistograms, classes: Sequence[str]) -> list[Curves]:
    """Curves of the classes that have samples, thinned."""
    listed = []
    for number, curves in curves_of_classes(scores).items():
        chosen = _spread(curves.recall, curves.precision, curves.false_positive_rate)
        listed.append(
            Curves(
                name=classes[number],
                recall=curves.recall[chosen].round(4).tolist(),
                precision=curves.precision[chosen].round(4).tolist(),
                false_positive_rate=curves.false_positive_rate[chosen].round(4).tolist(),
                average_precision=curves.average_precision,
                auroc=curves.auroc,
            )
        )
    return listed


def _spread(*values: Floats) -> npt.NDArray[np.intp]:
    """Indices of at most :data:`CURVE_POINTS` points, evenly spaced along the curve, with both of its ends."""
    length = np.concatenate([[0.0], np.abs(np.diff(np.stack(values))).sum(axis=0).cumsum()])
    return np.unique(np.searchsorted(length, np.linspace(0, length[-1], CURVE_POINTS)).clip(0, len(length) - 1))
