"""Warnings about a run that an experienced colleague would give, from its validations.

Each kind is a pure function in :mod:`~job.monitoring.advice.curves`, :mod:`~job.monitoring.advice.predictions` or
:mod:`~job.monitoring.advice.data`. Each needs a minimum number of
samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from job.model.evaluation import Evaluation
from job.monitoring.advice import curves, data, predictions
from job.monitoring.advice.context import Advice, Context
from job.monitoring.history import ValidationRecord

__all__ = ["Advice", "Context", "advise"]


def advise(
    history: Sequence[ValidationRecord], evaluation: Evaluation, classes: Sequence[str], context: Context
) -> list[Advice]:
    """All advice on a run, the most important first.

    Args:
        history: its validations, in order.
        evaluation: the last validation.
        classes: class names.
        context: settings of the run.
    """
    if not history:
        return []
    candidates = [
        curves.learning_rate(history, context),
        data.repeated_images(context),
        predictions.never_predicted(history, evaluation, classes, context),
        predictions.imbalance(history, evaluation, classes, context),
        curves.overfitting(history, context),
        curves.rising_loss(history, context),
        curves.head_past_best(history, context),
        curves.underfitting(history, context),
        predictions.calibration(history, evaluation, context),
        data.data_wait(history, context),
    ]
    return [each for each in candidates if each is not None]
