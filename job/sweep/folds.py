"""Folds of a cross-validation: stratified by class, with copies of an image in one fold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from job.errors import DataError
from job.process.terminal import escape

CLOSE = 1e-4
"""Features of copies of an image differ by less than this, relative to their norm."""
NEIGHBOURS = 3
"""Images of the next larger projections that each image is compared with."""


def copies(features: Tensor, seed: int = 0) -> npt.NDArray[np.int64]:
    """Group of each sample, int64 [N]: images with equal features, up to rounding, have one group.

    Candidates are found by a random projection, which is nearly equal for them: two samples are compared if they are
    among :data:`NEIGHBOURS` in its order.

    Args:
        features: float [N, F]; of the images as they are.
        seed: of the projection.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(features.shape[1], generator=generator).to(features.device)
    projected = torch.cat([block.float() @ direction for block in torch.split(features, 4096)])
    order = projected.argsort()
    groups = np.arange(len(features))
    for distance in range(1, NEIGHBOURS + 1):
        for start in range(0, len(order) - distance, 4096):
            first = order[start : min(start + 4096, len(order) - distance)]
            second = order[start + distance : start + distance + len(first)]
            close = (projected[first] - projected[second]).abs() <= CLOSE * direction.norm() * (
                features[first].float().norm(dim=1)
            )
            first, second = first[close], second[close]
            one, other = features[first].float(), features[second].float()
            same = (one - other).norm(dim=1) <= CLOSE * one.norm(dim=1)
            for left, right in zip(first[same].tolist(), second[same].tolist(), strict=True):
                groups[_root(groups, right)] = _root(groups, left)
    return np.array([_root(groups, sample) for sample in range(len(groups))], np.int64)


def _root(groups: npt.NDArray[np.int64], sample: int) -> int:
    while groups[sample] != sample:
        groups[sample] = groups[groups[sample]]
        sample = int(groups[sample])
    return sample


def stratified_folds(
    labels: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], folds: int, classes: Sequence[str], seed: int
) -> npt.NDArray[np.int64]:
    """The fold of each sample, int64 [N]: every fold has nearly the same number of each class.

    A group lies within one fold, and counts as of its first sample's class.

    Args:
        labels: class numbers, int [N]; -1 for samples without a label, which are a class of their own.
        groups: group of each sample.
        folds: number of folds.
        classes: class names.
        seed: of the order.

    Raises:
        DataError: a class has fewer groups than folds.
    """
    group_labels, _ = _grouped(labels, groups)
    for label in np.unique(group_labels):
        count = int((group_labels == label).sum())
        if count < folds and label >= 0:
            name, images = escape(classes[label]), int((labels == label).sum())
            different = "" if images == count else f", of which {count} differ"
            fewer = f"use --sweep.folds={count}, " if count > 1 else ""
            raise DataError(
                f"the class {name} has {images} training image(s){different}, and {folds} folds need at least {folds}: "
                f"{fewer}add images, or leave the class out."
            )
    return assign_folds(labels, groups, folds, seed)


def assign_folds(
    labels: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """As :func:`stratified_folds`, but a class may have fewer groups than there are folds, some of which lack it then.

    Args:
        labels: class numbers, int [N]; -1 for samples without a label, which are a class of their own.
        groups: group of each sample.
        folds: number of folds.
        seed: of the order.
    """
    group_labels, inverse = _grouped(labels, groups)
    sizes = np.bincount(inverse)
    generator = np.random.default_rng(seed)
    fold_of_group = np.empty(len(group_labels), np.int64)
    total = np.zeros(folds, np.int64)
    for label in np.unique(group_labels):
        members = generator.permutation(np.flatnonzero(group_labels == label))
        members = members[np.argsort(-sizes[members], kind="stable")]
        counts = np.zeros(folds, np.int64)
        for group in members:
            fold = np.lexsort((total, counts))[0]
            fold_of_group[group] = fold
            counts[fold] += sizes[group]
            total[fold] += sizes[group]
    return fold_of_group[inverse]


def _grouped(
    labels: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The label of each group's first sample, and the number of each sample's group."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return labels[first], inverse
