"""Mean and standard deviation of the images that an architecture's pretrained weights were trained with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torchvision

from job.model.backbone import CONVERTS_IMAGES, TIMM
from job.model.spec import Channels, decode_spec
from job.model.weights import saved_classifier

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalisation(NamedTuple):
    """Normalisation of images in [0, 1].

    Attributes:
        mean: per channel.
        std: per channel.
        source: where the values come from, for the log.
    """

    mean: Channels
    std: Channels
    source: str


def normalisation(backbone: str, weights: str) -> Normalisation:
    """The values that fit ``--model.weights``.

    A checkpoint of this job holds its own; otherwise those of the architecture's default pretrained weights are used,
    and ImageNet's where it has none.

    Raises:
        JobError: the weights are a run_dir without checkpoints, or cannot be read.
    """
    if weights not in ("DEFAULT", "none") and (saved := saved_classifier(weights)) is not None:
        spec = decode_spec(saved, weights)
        return Normalisation(spec.mean, spec.std, f"the run of {weights}")
    found = _timm(backbone.removeprefix(TIMM)) if backbone.startswith(TIMM) else _torchvision(backbone)
    if found is not None:
        return Normalisation(*found, f"the pretrained weights of {backbone}")
    return Normalisation(IMAGENET_MEAN, IMAGENET_STD, "ImageNet")


def completed(chosen: Mapping[str, Channels | None], backbone: str, weights: str) -> tuple[Channels, Channels]:
    """The user's ``mean`` and ``std``, or the weights' own where they are None; the log says which are used."""
    mean, std = chosen["mean"], chosen["std"]
    if mean is not None and std is not None:
        return mean, std
    default = normalisation(backbone, weights)
    mean, std = mean or default.mean, std or default.std
    log.info("images are normalised by mean %s and std %s; the default is that of %s", mean, std, default.source)
    return mean, std


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
