"""Selective classification: predictions below a confidence are rejected, so that the others are right more often.

Precision of the accepted predictions against their share, the coverage (El-Yaniv and Wiener, 2010; Geifman and
El-Yaniv, arXiv:1705.08500, whose risk is 1 - precision).
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

MOST_POINTS = 256
LEAST_ACCEPTED = 20
"""Predictions of which a precision is measured, at least."""
REPORTED_PRECISIONS = (0.9, 0.95, 0.99)

Confidences = Annotated[list[Annotated[float, Meta(ge=0, le=1)]], Meta(min_length=1, max_length=MOST_POINTS)]
Counts = Annotated[list[Annotated[int, Meta(ge=0, lt=2**53)]], Meta(min_length=1, max_length=MOST_POINTS)]


class OperatingPoint(NamedTuple):
    """A threshold, and what it gave on the validation samples.

    Attributes:
        threshold: confidence from which a prediction is accepted.
        precision: share of the accepted predictions that are right.
        coverage: share of all predictions that are accepted.
    """

    threshold: float
    precision: float
    coverage: float


class RiskCoverage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many predictions of validation were accepted at falling thresholds, and how many of those were right.

    Attributes:
        thresholds: confidences, falling.
        accepted: predictions of at least this confidence.
        correct: those of them that are right.
    """

    thresholds: Confidences
    accepted: Counts
    correct: Counts

    def __post_init__(self) -> None:
        if not len(self.thresholds) == len(self.accepted) == len(self.correct):
            raise ValueError("thresholds and counts of predictions differ in number")
        if not all(map(math.isfinite, self.thresholds)) or self.accepted[-1] < 1:
            raise ValueError("thresholds are not finite, or no prediction is accepted")

    def at(self, precision: float) -> OperatingPoint | None:
        """The lowest threshold at which the precision is at least this; None where it is never reached."""
        found = None
        for threshold, accepted, correct in zip(self.thresholds, self.accepted, self.correct, strict=True):
            if accepted >= LEAST_ACCEPTED and correct >= precision * accepted:
                found = OperatingPoint(threshold, correct / accepted, accepted / self.accepted[-1])
        return found


def risk_coverage(confidences: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> RiskCoverage:
    """The curve of predictions, thinned to :data:`MOST_POINTS` points.

    Args:
        confidences: of each prediction, [N]; at least one.
        correct: whether it is right, [N].
    """
    order = np.argsort(-confidences, kind="stable")
    falling, right = confidences[order], correct[order].cumsum()
    last_of_equal = np.append(np.flatnonzero(np.diff(falling)), len(falling) - 1)
    places = last_of_equal[np.unique(np.linspace(0, len(last_of_equal) - 1, MOST_POINTS).astype(np.int64))]
    return RiskCoverage(falling[places].tolist(), (places + 1).tolist(), right[places].tolist())
