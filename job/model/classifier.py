"""The network: normalise → backbone → head, images in and logits out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from job.model.backbone import build_backbone, feature_width


class Classifier(nn.Module):
    """A backbone with a new head for ``classes``.

    Two classes get one logit (binary cross-entropy, the probability of the second class), more get
    one logit each.

    Args:
        hidden: widths of the head's hidden layers, each followed by ReLU.
        mean, std: of the normalisation the backbone was trained with, a channel, for images in [0, 1].
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        classes: Sequence[str],
        hidden: Sequence[int],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.name = name
        self.classes = tuple(classes)
        self.hidden = tuple(hidden)
        self.image_size = image_size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(list(mean)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(3, 1, 1))
        # Convolutions run up to 5 times as fast in this layout on a CPU, and on tensor cores; others do not mind.
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.head = build_head(feature_width(backbone, image_size), hidden, logits=self.num_logits)

    @property
    def num_logits(self) -> int:
        """Width of the output: 1 for two classes."""
        return 1 if len(self.classes) == 2 else len(self.classes)

    @property
    def backbone_trains(self) -> bool:
        """Whether any of the backbone's parameters is to have a gradient."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to logits, float [B, num_logits]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to the backbone's output [B, F], kept for a backward pass only where a part trains."""
        normalised = (images.float() / 255 - self.mean) / self.std
        with torch.set_grad_enabled(self.backbone_trains and torch.is_grad_enabled()):
            features: Tensor = self.backbone(normalised.contiguous(memory_format=torch.channels_last))
        return features

    def spec(self) -> dict[str, Any]:
        """What :func:`from_spec` needs to build this network again: plain values only."""
        return {
            "backbone": self.name,
            "classes": list(self.classes),
            "hidden": list(self.hidden),
            "image_size": self.image_size,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }


def from_spec(spec: dict[str, Any]) -> Classifier:
    """The network that :meth:`Classifier.spec` describes, with random weights."""
    fields = dict(spec)
    name = fields.pop("backbone")
    return Classifier(build_backbone(name), name=name, **fields)


def build_head(features: int, hidden: Sequence[int], logits: int) -> nn.Sequential:
    """Linear layers ``features → hidden… → logits`` with ReLU between them."""
    widths = [features, *hidden]
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], logits))


def mean_over_mirrored(net: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, num_logits] of images [B, 3, S, S], averaged with those of the mirrored images."""
    logits: Tensor = (net(images) + net(images.flip(-1))) / 2
    return logits


def probabilities(logits: Tensor) -> Tensor:
    """float [B, num_classes], rows summing to 1, from logits of either kind."""
    if logits.shape[1] == 1:
        second = logits[:, 0].float().sigmoid()
        return torch.stack([1 - second, second], dim=1)
    return logits.float().softmax(dim=1)
