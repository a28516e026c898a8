"""Confident learning: images whose label out-of-fold probabilities contradict.

An image counts for a class if its probability is at least the mean that images labelled with this class have. Images
that count for another class than their label are suspected: the off-diagonal cells of the confident joint of Northcutt,
Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", Journal of Artificial Intelligence
Research 70 (2021), section 3. Results are those of cleanlab's ``find_label_issues`` with
``filter_by="confident_learning"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOLERANCE = 1e-6
"""Probabilities that differ by less are equal."""
ABSENT = 2.0
"""Threshold of a class without images: no probability reaches it."""

Samples = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]
Blocks = Callable[[], Iterable[tuple[Samples, Probabilities]]]
"""Sample ids [B] and probabilities [B, C], block by block; called twice, so that all need not be in memory at once."""


@dataclass(frozen=True)
class LabelErrors:
    """Images whose label is suspected, the most suspicious first.

    Attributes:
        samples: sample ids, int64 [E].
        suggested: class number, int64 [E].
        self_confidence: probability of the given label, float64 [E].
        normalized_margin: that probability minus the largest one of other classes, from -1 to 1, float64 [E].
    """

    samples: Samples
    suggested: npt.NDArray[np.int64]
    self_confidence: Probabilities
    normalized_margin: Probabilities


def find_label_errors(blocks: Blocks, labels: npt.NDArray[np.int64], num_classes: int) -> LabelErrors:
    """Label errors of images with one label each, ordered by self-confidence.

    Args:
        blocks: out-of-fold probabilities of the images to check.
        labels: class number of each sample id, int64 [N].
        num_classes: number of classes.
    """
    totals, counts = np.zeros(num_classes), np.zeros(num_classes)
    for samples, probabilities in blocks():
        given = labels[samples]
        totals += np.bincount(given, probabilities[np.arange(len(given)), given], minlength=num_classes)
        counts += np.bincount(given, minlength=num_classes)
    thresholds = _thresholds(totals, counts)
    found: list[LabelErrors] = []
    for samples, probabilities in blocks():
        rows, given = np.arange(len(samples)), labels[samples]
        reached = probabilities >= thresholds - TOLERANCE
        # Of several classes that an image counts for, the most probable one is meant.
        suggested = np.where(reached.sum(1) > 1, probabilities.argmax(1), reached.argmax(1))
        own = probabilities[rows, given]
        others = probabilities.copy()
        others[rows, given] = -np.inf
        margin = own - others.max(1)
        errors = reached.any(1) & (suggested != given) & (margin < -TOLERANCE)
        found.append(LabelErrors(samples[errors], suggested[errors], own[errors], margin[errors]))
    return _ordered(found)


@dataclass(frozen=True)
class WrongClasses:
    """Classes that images should have, or should not have, though the data says the opposite.

    Attributes:
        samples: sample ids, int64 [E].
        classes: class numbers, int64 [E]: has the image this label, it is one too many; else it lacks it.
        self_confidence: probability of what the data says about this class, float64 [E].
    """

    samples: Samples
    classes: npt.NDArray[np.int64]
    self_confidence: Probabilities

    def without(self, classes: npt.NDArray[np.int64]) -> WrongClasses:
        """Those of other classes."""
        keep = ~np.isin(self.classes, classes)
        return WrongClasses(self.samples[keep], self.classes[keep], self.self_confidence[keep])


def find_wrong_classes(
    blocks: Blocks, targets: Callable[[Samples], npt.NDArray[np.uint8]], num_classes: int
) -> WrongClasses:
    """Label errors of images with any number of labels: each class is a problem of two classes of its own.

    Args:
        blocks: out-of-fold probability of each class.
        targets: multi-hot labels, uint8 [B, C], of some samples.
        num_classes: number of classes.
    """
    totals, counts = np.zeros((2, num_classes)), np.zeros((2, num_classes))
    for samples, probabilities in blocks():
        has = targets(samples) > 0
        totals += np.stack([np.where(has, 0.0, 1 - probabilities).sum(0), np.where(has, probabilities, 0.0).sum(0)])
        counts += np.stack([(~has).sum(0), has.sum(0)])
    absent, present = _thresholds(totals, counts)
    found: list[WrongClasses] = []
    for samples, probabilities in blocks():
        has = targets(samples) > 0
        counts_as_present = probabilities >= present - TOLERANCE
        counts_as_absent = 1 - probabilities >= absent - TOLERANCE
        both = counts_as_present & counts_as_absent
        is_present = np.where(both, probabilities > 0.5, counts_as_present)
        own = np.where(has, probabilities, 1 - probabilities)
        wrong = (counts_as_present | counts_as_absent) & (is_present != has) & (2 * own - 1 < -TOLERANCE)
        rows, classes = np.nonzero(wrong)
        found.append(WrongClasses(samples[rows], classes.astype(np.int64), own[rows, classes]))
    empty = np.empty(0, np.int64)
    return WrongClasses(
        np.concatenate([empty, *(each.samples for each in found)]),
        np.concatenate([empty, *(each.classes for each in found)]),
        np.concatenate([np.empty(0), *(each.self_confidence for each in found)]),
    )


def _thresholds(totals: Probabilities, counts: Probabilities) -> Probabilities:
    means = np.maximum(totals / np.maximum(counts, 1), 2 * TOLERANCE)
    thresholds: Probabilities = np.where(counts > 0, means, ABSENT)
    return thresholds


def _ordered(found: list[LabelErrors]) -> LabelErrors:
    samples = np.concatenate([np.empty(0, np.int64), *(each.samples for each in found)])
    suggested = np.concatenate([np.empty(0, np.int64), *(each.suggested for each in found)])
    confidence = np.concatenate([np.empty(0), *(each.self_confidence for each in found)])
    margin = np.concatenate([np.empty(0), *(each.normalized_margin for each in found)])
    order = np.lexsort((samples, confidence))
    return LabelErrors(samples[order], suggested[order], confidence[order], margin[order])
