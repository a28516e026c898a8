"""Classes that out-of-fold predictions mix up, and how balanced classes are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from job.audit.label_errors import Probabilities
from job.audit.search import Samples

LEAST_ERROR = 0.2
"""Error between two classes from which on they count as confused; 0.5 is chance."""
FEWEST_IMAGES = 5
"""Images that are taken for the other class, at least."""
MOST_PAIRS = 100
IMBALANCE = 10.0
"""Ratio of the largest class to the smallest from which on it is reported."""


@dataclass(frozen=True)
class Confusion:
    """Counts of predictions.

    Attributes:
        labels: class numbers of the cells that are not zero, int64 [E].
        predicted: class numbers predicted, int64 [E].
        counts: number of images, int64 [E].
        num_classes: number of classes.
    """

    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    num_classes: int

    def accuracy(self) -> npt.NDArray[np.float64]:
        """Share of each class's images that are assigned to it, float64 [C]; NaN for a class that was not checked."""
        totals = np.bincount(self.labels, self.counts, minlength=self.num_classes)
        right = np.bincount(
            self.labels, np.where(self.labels == self.predicted, self.counts, 0), minlength=self.num_classes
        )
        shares: npt.NDArray[np.float64] = np.divide(
            right, totals, out=np.full(self.num_classes, np.nan), where=totals > 0
        )
        return shares


def confusion_of(
    blocks: Iterable[tuple[Samples, Probabilities]], labels: npt.NDArray[np.int64], num_classes: int
) -> Confusion:
    """Count the out-of-fold predictions.

    Args:
        blocks: out-of-fold probabilities.
        labels: class number of each sample id, int64 [N].
        num_classes: number of classes.
    """
    cells: dict[int, int] = {}
    for samples, probabilities in blocks:
        numbers, counts = np.unique(labels[samples] * num_classes + probabilities.argmax(1), return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            cells[number] = cells.get(number, 0) + count
    numbers = np.array(sorted(cells), np.int64)
    counts = np.array([cells[number] for number in numbers.tolist()], np.int64)
    return Confusion(numbers // num_classes, numbers % num_classes, counts, num_classes)


def confused_pairs(confusion: Confusion) -> list[tuple[int, int, float, int]]:
    """(class, class, error, images taken for the other) of pairs that are hardly told apart, the worst first.

    The error is the mean over both classes of the share taken for the other one, among the images taken for one of the
    two: the size of a class does not matter.
    """
    cells = {
        (label, predicted): count
        for label, predicted, count in zip(
            confusion.labels.tolist(), confusion.predicted.tolist(), confusion.counts.tolist(), strict=True
        )
    }
    pairs = []
    for first, second in {(min(cell), max(cell)) for cell in cells if cell[0] != cell[1]}:
        wrong, back = cells.get((first, second), 0), cells.get((second, first), 0)
        of_first, of_second = wrong + cells.get((first, first), 0), back + cells.get((second, second), 0)
        error = (wrong / max(of_first, 1) + back / max(of_second, 1)) / 2
        if error >= LEAST_ERROR and wrong + back >= FEWEST_IMAGES:
            pairs.append((first, second, error, wrong + back))
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[3], pair[:2]))[:MOST_PAIRS]
