"""Confident learning: images whose label out-of-fold probabilities contradict.

An image counts for a class if its probability is at least the mean that images labelled with this class have. How often
images of each label count for each class, the confident joint, estimates the number of errors in each label; so many
images are suspected, those that other classes exceed by the largest margins. See Northcutt, Jiang and Chuang,
"Confident Learning: Estimating Uncertainty in Dataset Labels", Journal of Artificial Intelligence Research 70 (2021),
section 3: this is its "prune by noise rate", the default of cleanlab's ``find_label_issues``, whose results it equals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from job.audit.search import Samples

TOLERANCE = 1e-6
"""Probabilities that differ by less are equal."""
ABSENT = 2.0
"""Threshold of a class without images: no probability reaches it."""
ELEMENTS = 1 << 24
"""Probabilities that are held at once where images have several labels."""

Probabilities = npt.NDArray[np.float64]
Predict = Callable[[Samples], Iterable[tuple[Samples, Probabilities]]]
"""Sample ids [B] and probabilities [B, C] of some samples, block by block, in any order."""


@dataclass(frozen=True)
class LabelErrors:
    """Images whose label is suspected, ordered by self-confidence, the lowest first.

    Attributes:
        samples: sample ids, int64 [E].
        suggested: the most probable class, int64 [E].
        self_confidence: probability of the given label, float64 [E].
        normalized_margin: that probability minus the largest one of other classes, from -1 to 1, float64 [E].
    """

    samples: Samples
    suggested: npt.NDArray[np.int64]
    self_confidence: Probabilities
    normalized_margin: Probabilities

    def __getitem__(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> LabelErrors:
        """Some of them."""
        return LabelErrors(
            self.samples[rows], self.suggested[rows], self.self_confidence[rows], self.normalized_margin[rows]
        )


def find_label_errors(
    predict: Predict, samples: Samples, labels: npt.NDArray[np.int64], num_classes: int
) -> LabelErrors:
    """Label errors of images with one label each.

    Probabilities are computed block by block, several times. Memory holds those of one label.

    Args:
        predict: out-of-fold probabilities.
        samples: sample ids to check, in increasing order.
        labels: class number of each sample id, int64 [N].
        num_classes: number of classes.
    """
    if not len(samples):
        return _joined([])
    thresholds = _thresholds(predict, samples, labels, num_classes)
    cells: dict[int, dict[int, int]] = {}
    parts: list[LabelErrors] = []
    for rows, probabilities in predict(samples):
        given, places = labels[rows], np.arange(len(rows))
        reached = probabilities >= thresholds - TOLERANCE
        # Of several classes that an image counts for, the most probable one is meant.
        guess = np.where(reached.sum(1) > 1, probabilities.argmax(1), reached.argmax(1))
        counted = reached.any(1)
        pairs, counts = np.unique(np.stack([given, guess])[:, counted], axis=1, return_counts=True)
        for label, other, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            row = cells.setdefault(label, {})
            row[other] = row.get(other, 0) + count
        own = probabilities[places, given]
        others = probabilities.copy()
        others[places, given] = -np.inf
        margin = own - others.max(1)
        wrong = margin < -TOLERANCE
        parts.append(LabelErrors(rows[wrong], others.argmax(1)[wrong], own[wrong], margin[wrong]))
    candidates = _joined(parts)
    counts_of_label = np.bincount(labels[samples], minlength=num_classes)
    suspected = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels[candidates.samples]).tolist():
        errors = _errors_per_class(label, cells, int(counts_of_label[label]), num_classes)
        classes = np.flatnonzero(errors)
        if len(classes) and counts_of_label[label] > 1:
            _suspect(predict, samples[labels[samples] == label], label, classes, errors[classes], suspected)
    return candidates[suspected[candidates.samples]]


def find_wrong_classes(
    predict: Predict,
    samples: Samples,
    targets: Callable[[Samples], npt.NDArray[np.uint8]],
    classes: npt.NDArray[np.int64],
) -> LabelErrors:
    """Label errors of images with any number of labels: each class is a problem of two classes of its own.

    An image comes once for each class that it should have or should not have, though the data says the opposite;
    ``suggested`` is the number of this class.

    Args:
        predict: out-of-fold probability of each class.
        samples: sample ids to check, in increasing order.
        targets: multi-hot labels, uint8 [B, C], of some samples.
        classes: numbers of the classes to check.
    """
    found: list[LabelErrors] = []
    step = max(ELEMENTS // max(len(samples), 1), 1)
    for start in range(0, len(classes), step):
        chosen = classes[start : start + step]
        values = np.empty((len(samples), len(chosen)))
        has = np.empty((len(samples), len(chosen)), np.int64)
        for rows, probabilities in predict(samples):
            places = np.searchsorted(samples, rows)
            values[places] = probabilities[:, chosen]
            has[places] = targets(rows)[:, chosen]
        for column, number in enumerate(chosen.tolist()):
            two = np.stack([1 - values[:, column], values[:, column]], axis=1)
            errors = find_label_errors(
                lambda rows, two=two: [(rows, two[rows])],  # type: ignore[misc]
                np.arange(len(samples)),
                has[:, column],
                2,
            )
            errors = LabelErrors(
                samples[errors.samples],
                np.full(len(errors.samples), number),
                errors.self_confidence,
                errors.normalized_margin,
            )
            found.append(errors)
    return _joined(found)


def _thresholds(
    predict: Predict, samples: Samples, labels: npt.NDArray[np.int64], num_classes: int
) -> npt.NDArray[np.float64]:
    """Mean probability of each class over the images labelled with it, float64 [C]."""
    totals, counts = np.zeros(num_classes), np.zeros(num_classes)
    for rows, probabilities in predict(samples):
        given = labels[rows]
        totals += np.bincount(given, probabilities[np.arange(len(given)), given], minlength=num_classes)
        counts += np.bincount(given, minlength=num_classes)
    means = np.maximum(totals / np.maximum(counts, 1), 2 * TOLERANCE)
    thresholds: npt.NDArray[np.float64] = np.where(counts > 0, means, ABSENT)
    return thresholds


def _errors_per_class(
    label: int, cells: dict[int, dict[int, int]], images: int, num_classes: int
) -> npt.NDArray[np.int64]:
    """Estimated number of images with a label that belong to each other class, int64 [C]."""
    row = np.zeros(num_classes)
    for other, count in cells.get(label, {}).items():
        row[other] = count
    row[label] = max(row[label], 1)
    row = row / row.sum() * images
    counts = row.round()
    # Rounded so that the sum stays: the entries that rounding changed most are rounded the other way.
    missing = int(images - counts.sum())
    direction = 1 if missing > 0 else -1
    for place in np.argsort(row - counts)[::-direction][: abs(missing)]:
        counts[place] += direction
    if counts[label] < 1:  # one image of the label stays
        others = max(np.count_nonzero(counts) - 1, 1)
        counts = np.maximum(counts - (1 - counts[label]) / others, 0).astype(np.int64)
    counts[label] = 0
    errors: npt.NDArray[np.int64] = counts.astype(np.int64)
    return errors


def _suspect(
    predict: Predict,
    samples: Samples,
    label: int,
    others: npt.NDArray[np.int64],
    errors: npt.NDArray[np.int64],
    suspected: npt.NDArray[np.bool_],
) -> None:
    """Mark those images of one label that other classes exceed by the largest margins, as many as errors per class."""
    margins = np.empty((len(samples), len(others)), np.float32 if len(samples) * len(others) > ELEMENTS else np.float64)
    for rows, probabilities in predict(samples):
        margins[np.searchsorted(samples, rows)] = probabilities[:, others] - probabilities[:, [label]]
    for column, count in enumerate(errors.tolist()):
        suspected[samples[np.argsort(-margins[:, column])[:count]]] = True


def _joined(parts: list[LabelErrors]) -> LabelErrors:
    empty = np.empty(0, np.int64)
    everything = LabelErrors(
        np.concatenate([empty, *(each.samples for each in parts)]),
        np.concatenate([empty, *(each.suggested for each in parts)]),
        np.concatenate([np.empty(0), *(each.self_confidence for each in parts)]),
        np.concatenate([np.empty(0), *(each.normalized_margin for each in parts)]),
    )
    return everything[np.lexsort((everything.samples, everything.self_confidence))]
