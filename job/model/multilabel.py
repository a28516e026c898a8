"""Multi-label classification: an image has any number of the classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from job.data.dataset import Batch
from job.data.index.index import Index
from job.model.task import Task

if TYPE_CHECKING:
    # It imports torchmetrics, which prediction does without.
    from job.model.metrics import TaskMetrics
    from job.model.training_metrics import TrainingMetrics

LARGEST_WEIGHT = 100.0
"""Bound of a class's ``pos_weight``, and the inverse of its lower bound: one image does not outweigh a data set."""


class MultilabelTask(Task):
    """Binary cross-entropy of each class against the rest; one logit per class.

    A sample's loss is the mean over the classes, as of ``torch.nn.BCEWithLogitsLoss``, so that its size and suitable
    learning rates do not depend on the number of classes. With balanced class weights the positive samples of a class
    weigh ``negatives / positives``, the ``pos_weight`` of torch, within :data:`LARGEST_WEIGHT`.
    """

    monitor = "val/mAP"
    takes_several_labels = True

    def training_losses(self, batch: Batch, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Mean binary cross-entropy over the classes, per sample: float [B]."""
        targets = multi_hot(batch, self.num_classes)
        targets = targets * (1 - self._label_smoothing) + self._label_smoothing / 2
        if self._mix is not None:
            images, targets = self._mix(batch["image"].float(), targets)
            batch = {**batch, "image": images}
        if self._balanced and self._class_weights is None:
            self._class_weights = positive_weights(self._train_index(), self.num_classes).to(targets.device)
        return per_sample_loss(forward(batch), targets, self._class_weights)

    def evaluate(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The arguments of :meth:`~job.model.multilabel_metrics.MultilabelMetrics.update_logits`."""
        targets = multi_hot(batch, self.num_classes)
        return {
            "losses": per_sample_loss(logits, targets),
            "logits": logits,
            "labels": targets.to(torch.uint8),
            "mask": batch["mask"],
            "samples": batch["sample"],
        }

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Probability of each class, float [B, C]; they are independent of each other."""
        return logits.float().sigmoid()

    @staticmethod
    def make_metrics(classes: Sequence[str], *, samples: int = 0, synchronise: bool = True) -> TaskMetrics:
        """See :class:`~job.model.multilabel_metrics.MultilabelMetrics`."""
        from job.model.multilabel_metrics import MultilabelMetrics

        return MultilabelMetrics(classes, samples=samples, synchronise=synchronise)

    def make_training_metrics(self) -> TrainingMetrics:
        """Loss and micro F1."""
        from job.model.training_metrics import TrainingF1, TrainingMetrics

        return TrainingMetrics() if self._mix is not None else TrainingF1(self.num_classes)


def multi_hot(batch: Batch, num_classes: int) -> Tensor:
    """Multi-hot targets of a batch, float [B, C]; those of data with one label per image are one-hot."""
    if "labels" in batch:
        return batch["labels"].float()
    return F.one_hot(batch["label"].clamp(min=0), num_classes).float()


def per_sample_loss(logits: Tensor, targets: Tensor, positive_weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over the classes; float [B].

    Args:
        logits: float [B, C].
        targets: probability of each class, float [B, C].
        positive_weights: weight of the positive part of each class's loss, float [C].
    """
    return F.binary_cross_entropy_with_logits(
        logits.float(), targets, reduction="none", pos_weight=positive_weights
    ).mean(dim=1)


def positive_weights(index: Index, num_classes: int) -> Tensor:
    """Negative samples per positive one of each class, float [C], within :data:`LARGEST_WEIGHT`."""
    positives = index.class_counts()
    weights = (len(index) - positives) / np.maximum(positives, 1)
    return torch.from_numpy(weights.clip(1 / LARGEST_WEIGHT, LARGEST_WEIGHT)).float()
