"""What is minimised: cross-entropy, to smoothed, mixed and weighted targets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2


def smoothed(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """float [B, C]: the share ``smoothing`` of each target goes to all classes alike (arXiv:1512.00567); int64 [B]."""
    one_hot = F.one_hot(labels.clamp(min=0), num_classes).float()
    return one_hot * (1 - smoothing) + smoothing / num_classes


def per_sample_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """float [B]: binary cross-entropy for one logit, which is the second class's, and cross-entropy for more.

    Args:
        targets: labels, int64 [B], or shares of the classes, float [B, C], rows summing to 1.
    """
    if logits.shape[1] == 1:
        second = targets[:, 1] if targets.ndim == 2 else targets.float()
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), second, reduction="none")
    return F.cross_entropy(logits.float(), targets, reduction="none")


def balanced_weights(labels: npt.NDArray[np.int32], num_classes: int) -> Tensor:
    """float [C]: a class's weight is inverse to how often it occurs, and 1 on average over the samples."""
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    return torch.from_numpy(counts.sum() / (num_classes * np.maximum(counts, 1))).float()


def mixing(mixup: float, cutmix: float) -> v2.Transform | None:
    """Mixes each image of a batch, and its target, with its neighbour's; one of both by chance where both are wanted.

    Args:
        mixup: alpha of arXiv:1710.09412; 0: none.
        cutmix: alpha of arXiv:1905.04899; 0: none.
    """
    kinds = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    return v2.RandomChoice(kinds) if kinds else None
