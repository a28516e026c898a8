"""Tasks: training targets, loss, metrics and predicted probabilities; :mod:`job.model.multilabel` is another one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from job.data.dataset import Batch
from job.data.index.index import Index

if TYPE_CHECKING:
    # They import Lightning and torchmetrics, which prediction does without.
    from job.model.config import ModelConfig
    from job.model.metrics import TaskMetrics
    from job.model.training_metrics import TrainingMetrics

Labels = npt.NDArray[np.int32]


class Task(ABC):
    """Training targets and loss of a network's classes.

    Args:
        config: chooses label smoothing, MixUp, CutMix and class weights.
        num_classes: number of classes.
        train_index: returns the training set; called if classes are weighted.

    Attributes:
        monitor: metric that ranks checkpoints by default.
        takes_several_labels: an image may have any number of labels, not exactly one.
    """

    monitor: ClassVar[str]
    takes_several_labels: ClassVar[bool]

    def __init__(self, config: ModelConfig, num_classes: int, train_index: Callable[[], Index]) -> None:
        self.num_classes = num_classes
        self._label_smoothing = config.label_smoothing
        self._mix = mixing(config.mixup, config.cutmix)
        self._balanced = config.class_weights == "balanced"
        self._train_index = train_index
        self._class_weights: Tensor | None = None

    @abstractmethod
    def training_losses(self, batch: Batch, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Loss per sample, float [B].

        Args:
            batch: a training batch.
            forward: computes the logits of a batch.
        """

    @abstractmethod
    def evaluate(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The arguments of :meth:`~job.model.metrics.TaskMetrics.update_logits`."""

    @staticmethod
    @abstractmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Probability of each class, float [B, C], from logits [B, num_logits]."""

    @staticmethod
    @abstractmethod
    def make_metrics(classes: Sequence[str], *, samples: int = 0, synchronise: bool = True) -> TaskMetrics:
        """The metrics of validation and test.

        Args:
            classes: class names, in the order of labels.
            samples: size of the largest data set that is evaluated.
            synchronise: sum over ranks, each of which evaluates its own batches.
        """

    @abstractmethod
    def make_training_metrics(self) -> TrainingMetrics:
        """The metrics of training; with MixUp or CutMix the loss alone, since an image has no label of its own."""


class ClassificationTask(Task):
    """Single-label classification by cross-entropy."""

    monitor = "val/accuracy"
    takes_several_labels = False

    def training_losses(self, batch: Batch, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Cross-entropy per sample, float [B]."""
        if not self._label_smoothing and self._mix is None and not self._balanced:
            return per_sample_loss(forward(batch), batch["label"])
        targets = smoothed(batch["label"], self.num_classes, self._label_smoothing)
        if self._mix is not None:
            images, targets = self._mix(batch["image"].float(), targets)
            batch = {**batch, "image": images}
        losses = per_sample_loss(forward(batch), targets)
        if self._balanced:
            if self._class_weights is None:
                weights = balanced_weights(self._train_index().labels, self.num_classes)
                self._class_weights = weights.to(targets.device)
            losses = losses * (targets @ self._class_weights)
        return losses

    def evaluate(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The arguments of :meth:`~job.model.metrics.EvaluationMetrics.update_logits`."""
        return {
            "losses": per_sample_loss(logits, batch["label"]),
            "logits": logits,
            "labels": batch["label"],
            "mask": batch["mask"],
            "samples": batch["sample"],
        }

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Class probabilities, float [B, C], from one logit (the second class's) or from one per class."""
        if logits.shape[1] == 1:
            second = logits[:, 0].float().sigmoid()
            return torch.stack([1 - second, second], dim=1)
        return logits.float().softmax(dim=1)

    @staticmethod
    def make_metrics(classes: Sequence[str], *, samples: int = 0, synchronise: bool = True) -> TaskMetrics:
        """See :class:`~job.model.metrics.EvaluationMetrics`."""
        from job.model.metrics import EvaluationMetrics

        return EvaluationMetrics(classes, samples=samples, synchronise=synchronise)

    def make_training_metrics(self) -> TrainingMetrics:
        """Loss and accuracy."""
        from job.model.training_metrics import TrainingAccuracy, TrainingMetrics

        return TrainingMetrics() if self._mix is not None else TrainingAccuracy()


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
