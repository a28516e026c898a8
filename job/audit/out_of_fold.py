"""Out-of-fold probabilities: each image is classified by a linear head that has not seen it, nor a copy of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from job.audit.label_errors import Probabilities
from job.audit.pool import ImagePool
from job.audit.search import Samples
from job.errors import DivergedError
from job.model.head import cpu_threads
from job.process.progress import Progress
from job.sweep.crossvalidation import head_of, plan_of, threads_for
from job.sweep.folds import assign_folds
from job.sweep.heads import HeadBatch, Targets, class_weights_of, heads_per_block, initial_head
from job.sweep.scores import score_heads
from job.sweep.trials import Trial

TRIALS = tuple(Trial(0, lr, weight_decay) for lr in (1e-3, 3e-3, 1e-2, 3e-2) for weight_decay in (0.01, 1.0))
"""Heads of which the one with the smallest out-of-fold loss is taken."""
BLOCK_BYTES = 512e6
"""Memory of the heads that are trained together."""
NO_LABEL = "without a label"
UNREADABLE = "unreadable"
TOO_FEW = "of a class with fewer than two different images"
IS_BLANK = "blank"


@dataclass(frozen=True)
class Checked:
    """Images whose label can be checked.

    Attributes:
        samples: sample ids, in increasing order.
        trains: bool [N], whether heads are trained on an image.
        left_out: number of images that are not checked, by reason.
        rare: class numbers with fewer than two different images, which are not checked.
    """

    samples: Samples
    trains: npt.NDArray[np.bool_]
    left_out: dict[str, int]
    rare: npt.NDArray[np.int64]


def images_to_check(
    pool: ImagePool, groups: Samples, readable: npt.NDArray[np.bool_], blank: npt.NDArray[np.bool_]
) -> Checked:
    """Choose the images whose labels out-of-fold probabilities may contradict.

    Args:
        pool: the images.
        groups: group of copies of each image, int64 [N].
        readable: bool [N].
        blank: bool [N], images without content.
    """
    left_out = {UNREADABLE: int((~readable).sum()), IS_BLANK: int((readable & blank).sum())}
    usable = readable & ~blank
    if pool.has_several_labels:
        labelled = np.ones(len(pool), np.bool_)  # no label at all is a statement, too
        checked = usable
        rare = _rare_classes(pool, groups, usable)
    else:
        labelled = pool.labels >= 0
        left_out[NO_LABEL] = int((usable & ~labelled).sum())
        first = np.unique(np.stack([groups, pool.labels])[:, usable & labelled], axis=1)
        different = np.bincount(first[1], minlength=len(pool.classes))
        rare = np.flatnonzero(different < 2)
        few = np.isin(pool.labels, rare)
        left_out[TOO_FEW] = int((usable & labelled & few).sum())
        checked = usable & labelled & ~few
    return Checked(
        np.flatnonzero(checked), usable & labelled, {why: count for why, count in left_out.items() if count}, rare
    )


def _rare_classes(pool: ImagePool, groups: Samples, usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Classes that fewer than two groups have, or fewer than two groups lack."""
    singles = np.flatnonzero(usable & (groups == np.arange(len(groups))))
    having = np.zeros(len(pool.classes), np.int64)
    for start in range(0, len(singles), 4096):
        having += pool.multi_hot_of(singles[start : start + 4096]).sum(0, dtype=np.int64)
    return np.flatnonzero((having < 2) | (len(singles) - having < 2))


class OutOfFold:
    """Heads of a cross-validation over all parts, and what each says about the images that it has not seen.

    Args:
        pool: the images.
        checked: those that are trained on and checked.
        groups: group of copies of each image, int64 [N]; a group lies within one fold.
        folds: number of folds.
        seed: of folds and order.
        device: that computes.

    Raises:
        DivergedError: no head has a finite loss.
    """

    def __init__(
        self, pool: ImagePool, checked: Checked, groups: Samples, folds: int, seed: int, device: torch.device
    ) -> None:
        self.pool = pool
        self.checked = checked
        rarest = np.where(checked.trains, pool.rarest_labels(), -1)
        self.folds = assign_folds(rarest, groups, folds, seed)
        # The number of a fold that no head leaves out would be one of an image that is never predicted.
        self.used = np.unique(self.folds[checked.samples])
        self._fold_of = torch.from_numpy(self.folds).to(device)
        self.targets = _targets(pool, checked).to(device)
        info = next(iter(pool.indexes().values())).info
        self.plan = plan_of(len(pool), None, None, seed, info.run_length, decay_biases=True)
        self._heads: HeadBatch | None = None
        self._trial = 0
        self._trials = 1
        self._train(device)

    def _train(self, device: torch.device) -> None:
        """Train the heads of all trials, and keep those of the best one."""
        width, used = self.pool.width, self.used.tolist()
        start = initial_head(width, (), self.targets.num_logits, self.plan.seed)
        most = heads_per_block(width, (), self.targets.num_logits, self.plan.batch_size, BLOCK_BYTES)
        each = max(min(most // len(used), len(TRIALS)), 1)
        blocks = [TRIALS[first : first + each] for first in range(0, len(TRIALS), each)]
        steps = self.plan.epochs * math.ceil(len(self.pool) / self.plan.batch_size)
        scored = np.full(len(self.pool), -1, np.int64)
        scored[self.checked.samples] = self.folds[self.checked.samples]
        best = math.inf
        with Progress("labels", "steps of heads", len(blocks) * steps) as progress:
            for trials in blocks:
                heads = [head_of(trial, fold) for fold in used for trial in trials]
                batch = HeadBatch(heads, start, 0.0, self.plan, device)
                with cpu_threads(threads_for(batch)):
                    batch.train(self.pool, self.targets, self._fold_of, after_step=progress.advance)
                losses = [score.loss for score in score_heads(batch, self.pool, self.targets, scored)]
                means = np.array(losses).reshape(len(used), len(trials)).mean(0)
                means[~np.isfinite(means)] = np.inf
                if means.min() < best:
                    best = float(means.min())
                    self._heads, self._trial, self._trials = batch, int(means.argmin()), len(trials)
        if self._heads is None:
            raise DivergedError("no head for the check of labels has a finite loss: the features are too large.")

    def predict(self, samples: Samples) -> Iterator[tuple[Samples, Probabilities]]:
        """(sample ids [B], probabilities [B, C]) of some images to check, block by block."""
        assert self._heads is not None, "checked at the end of the training"
        for number, fold in enumerate(self.used.tolist()):
            own = samples[self.folds[samples] == fold]
            place = number * self._trials + self._trial
            for logits, rows in self._heads.logits(self.pool, own, slice(place, place + 1)):
                values = logits[:, 0].double()
                if self.targets.several_labels:
                    probabilities = values.sigmoid()
                elif self.targets.num_logits == 1:
                    second = values[:, 0].sigmoid()
                    probabilities = torch.stack([1 - second, second], dim=1)
                else:
                    probabilities = values.softmax(1)
                yield rows.cpu().numpy(), probabilities.cpu().numpy()


def _targets(pool: ImagePool, checked: Checked) -> Targets:
    classes, valid = len(pool.classes), torch.from_numpy(checked.trains)
    if pool.has_several_labels:
        values = torch.from_numpy(pool.multi_hot_of(np.arange(len(pool)))).float()
    else:
        values = torch.from_numpy(pool.labels.astype(np.int64)).clamp(min=0)
    return Targets(values, valid, classes, class_weights_of(values, classes))
