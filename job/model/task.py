"""Classification: training targets, loss, and predicted probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from job.data.dataset import Batch

if TYPE_CHECKING:
    # It imports Lightning, which prediction does without.
    from job.model.config import ModelConfig

Labels = npt.NDArray[np.int32]


class ClassificationTask:
    """Single-label classification by cross-entropy, with label smoothing, MixUp, CutMix and class weights.

    Args:
        config: chooses among them.
        num_classes: number of classes.
        train_labels: returns the labels of the training set; called if classes are weighted.
    """

    def __init__(self, config: ModelConfig, num_classes: int, train_labels: Callable[[], Labels]) -> None:
        self.num_classes = num_classes
        self._label_smoothing = config.label_smoothing
        self._mix = mixing(config.mixup, config.cutmix)
        self._balanced = config.class_weights == "balanced"
        self._train_labels = train_labels
        self._class_weights: Tensor | None = None

    def training_losses(self, batch: Batch, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Loss per sample, float [B].

        Args:
            batch: a training batch.
            forward: computes the logits of a batch.
        """
        if not self._label_smoothing and self._mix is None and not self._balanced:
            return per_sample_loss(forward(batch), batch["label"])
        targets = smoothed(batch["label"], self.num_classes, self._label_smoothing)
        if self._mix is not None:
            images, targets = self._mix(batch["image"].float(), targets)
            batch = {**batch, "image": images}
        losses = per_sample_loss(forward(batch), targets)
        if self._balanced:
            if self._class_weights is None:
                self._class_weights = balanced_weights(self._train_labels(), self.num_classes).to(targets.device)
            losses = losses * (targets @ self._class_weights)
        return losses

    def evaluate(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The arguments of :meth:`~job.model.metrics.EvaluationMetrics.update`."""
        return {
            "losses": per_sample_loss(logits, batch["label"]),
            "probabilities": probabilities(logits),
            "labels": batch["label"],
            "mask": batch["mask"],
        }


def smoothed(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """One-hot targets of labels [B] with label smoothing (arXiv:1512.00567), float [B, C]."""
    one_hot = F.one_hot(labels.clamp(min=0), num_classes).float()
    return one_hot * (1 - smoothing) + smoothing / num_classes


def per_sample_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of one logit (the second class's), cross-entropy of several; float [B].

    Args:
        logits: float [B, num_logits].
        targets: labels, int64 [B], or class probabilities, float [B, C].
    """
    if logits.shape[1] == 1:
        second = targets[:, 1] if targets.ndim == 2 else targets.float()
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), second, reduction="none")
    return F.cross_entropy(logits.float(), targets, reduction="none")


def balanced_weights(labels: Labels, num_classes: int) -> Tensor:
    """Class weights inverse to class frequencies, float [C]; their mean over the samples is 1."""
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    return torch.from_numpy(counts.sum() / (num_classes * np.maximum(counts, 1))).float()


def mixing(mixup: float, cutmix: float) -> v2.Transform | None:
    """A transform of a batch's images and targets: MixUp, CutMix, or one of both at random; None without either.

    Args:
        mixup: alpha of MixUp (arXiv:1710.09412); 0 disables.
        cutmix: alpha of CutMix (arXiv:1905.04899); 0 disables.
    """
    kinds = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    return v2.RandomChoice(kinds) if kinds else None


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities, float [B, C], from one logit (the second class's) or from one per class."""
    if logits.shape[1] == 1:
        second = logits[:, 0].float().sigmoid()
        return torch.stack([1 - second, second], dim=1)
    return logits.float().softmax(dim=1)
