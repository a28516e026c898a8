"""Correct predictions, samples and predictions per class, from a confusion matrix."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from job.model.evaluation import Counts


class ClassCounts(NamedTuple):
    """Counts per class, int64 [C] each.

    Attributes:
        correct: predictions that are right.
        samples: of the class.
        predicted: samples that are predicted as the class.
    """

    correct: Counts
    samples: Counts
    predicted: Counts


def counts_of_cells(cells: Counts, classes: int) -> ClassCounts:
    """The counts from the cells of a confusion matrix that are not zero.

    Args:
        cells: int64 [N, 3], rows of (true class, predicted class, count); or one matrix of each class, int64 [C, 2, 2].
        classes: number of classes.
    """
    if cells.ndim == 3:
        return ClassCounts(cells[:, 1, 1], cells[:, 1].sum(axis=1), cells[:, :, 1].sum(axis=1))
    counts = ClassCounts(*(np.zeros(classes, np.int64) for _ in range(3)))
    np.add.at(counts.samples, cells[:, 0], cells[:, 2])
    np.add.at(counts.predicted, cells[:, 1], cells[:, 2])
    diagonal = cells[cells[:, 0] == cells[:, 1]]
    counts.correct[diagonal[:, 0]] = diagonal[:, 2]
    return counts
