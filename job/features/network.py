"""A pretrained backbone as a network whose features can be computed, without a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from job import redact
from job.cluster import ranks
from job.model.backbone import build_backbone
from job.model.classifier import Classifier
from job.model.loading import read_pretrained
from job.model.normalisation import complete_normalisation
from job.model.pooling import Pooling

NO_CLASSES = ("none",)
"""Classes of a network whose head is not used."""


def bare_backbone(
    name: str,
    weights: str = "DEFAULT",
    *,
    pooling: Pooling = "auto",
    image_size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | None = None,
) -> Classifier:
    """A pretrained backbone, with a head of random weights that nobody uses.

    Args:
        name: architecture: a name of torchvision.models, or timm/NAME.
        weights: as ``--model.weights``: DEFAULT, none, the URI of a state dict or checkpoint, or a run_dir.
        pooling: as ``--model.pooling``.
        image_size: height and width of images, in pixels.
        mean: per-channel mean of the pretraining images, in [0, 1]; None: that of the pretrained weights.
        std: per-channel standard deviation of the pretraining images; None: that of the pretrained weights.
        device: a torch device; default: as :func:`job.predict.load`.

    Raises:
        ConfigError: there is no such backbone, or it does not take images of this size.
        WeightsError: the weights cannot be downloaded, or belong to another architecture.
    """
    place = torch.device(device or default_device())
    pretrained = read_pretrained(redact.remember(weights))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(name, pretrained, image_size, pooling)
        channels = [None if values is None else (values[0], values[1], values[2]) for values in (mean, std)]
        chosen_mean, chosen_std = complete_normalisation(channels[0], channels[1], name, pretrained)
        net = Classifier(
            backbone,
            name=name,
            classes=NO_CLASSES,
            hidden=(),
            image_size=image_size,
            mean=chosen_mean,
            std=chosen_std,
            device_type=place.type,
            pooling=pooling,
        )
    return net.to(place).eval().requires_grad_(False)


def default_device() -> str:
    """The GPU of this rank (LOCAL_RANK, or the first), where CUDA has one, else the CPU."""
    gpus = torch.cuda.device_count()
    return f"cuda:{ranks.local_rank() % gpus}" if gpus else "cpu"
