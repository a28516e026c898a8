"""Per-channel mean and standard deviation that pretrained weights expect."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torchvision

from job.model.backbone import CONVERTS_IMAGES, TIMM
from job.model.spec import Channels
from job.model.weights import PretrainedWeights
from job.storage.tensor_file import printable

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalisation(NamedTuple):
    """Normalisation of images in [0, 1].

    Attributes:
        mean: per channel.
        std: per channel.
        source: origin of the values, for the log.
    """

    mean: Channels
    std: Channels
    source: str


def default_normalisation(backbone: str, weights: str | PretrainedWeights) -> Normalisation:
    """The normalisation that the pretrained weights expect.

    A checkpoint of this job describes its own, and a config.json beside a file of weights theirs. Otherwise it is that
    of the architecture's default pretrained weights, or ImageNet's if the architecture has none.
    """
    if isinstance(weights, PretrainedWeights) and weights.classifier is not None:
        return Normalisation(weights.classifier.mean, weights.classifier.std, f"the run of {weights.uri}")
    config = weights.config if isinstance(weights, PretrainedWeights) else None
    if config is not None and config.mean is not None and config.std is not None:
        if config.belongs_to(backbone):
            return Normalisation(config.mean, config.std, printable(config.uri))
        log.warning(
            "%s is not used: it describes %s, and not %s",
            printable(config.uri),
            printable(config.architecture or ""),
            backbone,
        )
    channels = _timm(backbone.removeprefix(TIMM)) if backbone.startswith(TIMM) else _torchvision(backbone)
    if channels is not None:
        return Normalisation(*channels, f"the pretrained weights of {backbone}")
    return Normalisation(IMAGENET_MEAN, IMAGENET_STD, "ImageNet")


def complete_normalisation(
    mean: Channels | None, std: Channels | None, backbone: str, weights: str | PretrainedWeights
) -> tuple[Channels, Channels]:
    """Replace a ``mean`` or ``std`` of None by the default of the weights, and log the result.

    Other values than those of pretrained weights are warned of.
    """
    if mean is not None and std is not None and weights == "none":
        return mean, std
    default = default_normalisation(backbone, weights)
    for option, chosen, expected in (("mean", mean, default.mean), ("std", std, default.std)):
        if weights != "none" and chosen is not None and not _are_close(chosen, expected):
            log.warning(
                "--model.%s is %s, and the weights were trained with %s (%s). Leave the option out to use theirs.",
                option,
                list(chosen),
                list(expected),
                default.source,
            )
    if mean is not None and std is not None:
        return mean, std
    mean, std = mean or default.mean, std or default.std
    log.info("images are normalised by mean %s and std %s; the default is that of %s", mean, std, default.source)
    return mean, std


def _are_close(values: Sequence[float], others: Sequence[float]) -> bool:
    return all(math.isclose(value, other, abs_tol=1e-3) for value, other in zip(values, others, strict=True))


def _torchvision(name: str) -> tuple[Channels, Channels] | None:
    if name in CONVERTS_IMAGES:
        # Their weights expect this. torchvision's transforms say ImageNet's values, and its networks convert images
        # ("transform_input"), which build_backbone switches off.
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    if name not in torchvision.models.list_models(module=torchvision.models):
        return None  # build_backbone says so
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return _channels(transforms.mean), _channels(transforms.std)


def _timm(name: str) -> tuple[Channels, Channels] | None:
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.mean or not config.std or len(config.mean) != 3 or len(config.std) != 3:
        return None
    return _channels(config.mean), _channels(config.std)


def _channels(values: object) -> Channels:
    red, green, blue = map(float, values)  # type: ignore[call-overload]
    return red, green, blue
