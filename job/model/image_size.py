"""The image size that pretrained weights were trained with: ``--data.image_size auto``."""

from __future__ import annotations

import torchvision

from job.errors import ConfigError
from job.model.backbone import TIMM, require_torchvision_name, timm_name
from job.model.loading import saved_spec, weights_file
from job.model.weights_config import read_weights_config


def own_image_size(backbone: str, weights: str) -> int:
    """Height and width of images, in pixels, that weights were trained with.

    A checkpoint of this job describes it, and so does the config.json beside a file of weights. Otherwise it is that of
    the architecture's default pretrained weights.

    Args:
        backbone: architecture: a name of torchvision.models, or timm/NAME.
        weights: as ``--model.weights``.

    Raises:
        ConfigError: there is no such architecture, or its images are not square.
        WeightsError: the config.json is damaged.
        CheckpointError: the run_dir holds no checkpoint, or a damaged one.
        StorageError: the weights cannot be read.
    """
    default = _timm(backbone) if backbone.startswith(TIMM) else _torchvision(backbone)  # a mistyped name is found first
    if weights not in ("DEFAULT", "none"):
        file = weights_file(weights)
        if (spec := saved_spec(file)) is not None:
            return spec.image_size
        config = read_weights_config(file)
        if config is not None and config.image_size is not None and config.belongs_to(backbone):
            return config.image_size
    if default is None:
        raise ConfigError(f"the image size of {backbone} is not known. Give --data.image_size a number.")
    return default


def _timm(backbone: str) -> int | None:
    name = timm_name(backbone)
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None
    _, height, width = config.input_size
    return int(height) if height == width else None


def _torchvision(backbone: str) -> int | None:
    require_torchvision_name(backbone)
    crop = torchvision.models.get_model_weights(backbone).DEFAULT.transforms().crop_size
    return int(crop[0])
