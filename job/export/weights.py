"""Export of plain weights: a state dict under the names of timm or torchvision, and a ``config.json``.

timm loads the folder by ``timm.create_model("local-dir:FOLDER", pretrained=True)``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from job import typed
from job.export import equality
from job.export.manifest import ModelDescription
from job.export.network import Array, Run, TrainedModel
from job.model.backbone import CONVERTS_IMAGES, TIMM, build_backbone, timm_size_options
from job.model.head import build_head

log = logging.getLogger(__name__)

FILE = "model.safetensors"
HEAD_FILE = "head.safetensors"
CONFIG = "config.json"
_POOLING_NOTES = {
    "cls": "; the head takes the class token of the backbone's forward_features",
    "mean": "; the head takes the mean of the patch tokens of the backbone's forward_features",
    "cls+mean": "; the head takes the class token and the mean of the patch tokens of the backbone's forward_features, "
    "concatenated",
}
"""How timm's network, which pools otherwise, is to be used; its fc_norm, if it has one, follows the pooling."""


def write_weights(model: TrainedModel, folder: Path, pixels: Tensor) -> tuple[list[str], str]:
    """Write the weights.

    A linear head becomes the architecture's own classification layer, where that computes the same. Other heads (with
    hidden layers, or after a classification layer that is no linear one) go to a file of their own. Two classes have
    two outputs, for a softmax as with more classes.

    Args:
        model: the network.
        folder: for the files.
        pixels: images on which both networks are compared, uint8 [B, 3, S, S].

    Returns:
        names of the files, and a note for their user.
    """
    spec = model.description
    head = model.network.calibrated_head()
    if len(spec.classes) == 2 and spec.task == "classification":
        head = two_logits(head)
    whole = _with_linear_head(model, head)
    images = torch.from_numpy(model.input_of(pixels, "normalised"))
    if whole is not None and not _is_equal(whole, model, images):
        log.info("%s places its classification layer elsewhere: the head is a file of its own", spec.backbone)
        whole = None
    state = (model.network.backbone if whole is None else whole).state_dict()
    _write(state, folder / FILE)
    files, activation = [CONFIG, FILE], "a softmax" if spec.task == "classification" else "a sigmoid"
    widths: list[int] = []
    if whole is None:
        _write(head.state_dict(), folder / HEAD_FILE)
        files.append(HEAD_FILE)
        widths = [layer.in_features for layer in head if isinstance(layer, nn.Linear)] + [len(spec.classes)]
    config = _config(spec, model.network.backbone if whole is None else whole, widths)
    (folder / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2))
    if whole is not None:
        return files, f"a state dict of the whole network; {activation} of its output gives probabilities"
    return files, (
        f"{FILE} has the backbone, without a classification layer; {HEAD_FILE} has the head, a Sequential of Linear "
        f"and ReLU with widths {widths}; {activation} of its output gives probabilities"
        f"{_POOLING_NOTES.get(spec.pooling, '')}"
    )


def runner(folder: Path, spec: ModelDescription) -> Run:
    """Load the files as their user would: with timm or torchvision, and torch alone."""
    config = typed.from_json((folder / CONFIG).read_bytes())
    state = safetensors.torch.load_file(folder / FILE)
    widths = config["head"]["widths"] if "head" in config else []
    network: nn.Module
    if widths:
        backbone = build_backbone(spec.backbone, image_size=spec.image_size, pooling=spec.pooling)
        backbone.load_state_dict(state)
        head = build_head(widths[0], widths[1:-1], widths[-1])
        head.load_state_dict(safetensors.torch.load_file(folder / HEAD_FILE))
        network = nn.Sequential(backbone, head)
    else:
        network = _library_model(spec)
        network.load_state_dict(state)
    network.eval()

    @torch.inference_mode()
    def run(images: Array) -> npt.NDArray[np.float32]:
        return _probabilities(network(torch.from_numpy(images)), spec).numpy()

    return run


def two_logits(head: nn.Sequential) -> nn.Sequential:
    """The head of two classes with two logits, ±z/2 of its logit z: their softmax equals the sigmoid of z."""
    *hidden, last = head
    assert isinstance(last, nn.Linear)
    output = nn.Linear(last.in_features, 2)
    with torch.no_grad():
        output.weight.copy_(torch.cat([-last.weight, last.weight]) / 2)
        output.bias.copy_(torch.cat([-last.bias, last.bias]) / 2)
    return nn.Sequential(*hidden, output)


def _with_linear_head(model: TrainedModel, head: nn.Sequential) -> nn.Module | None:
    """The library's network with these weights; None where its classification layers are not of the head's shape."""
    if len(head) != 1 or model.description.pooling != "auto":
        return None
    linear = {"weight": head[0].weight, "bias": head[0].bias}
    whole = _library_model(model.description)
    state = dict(model.network.backbone.state_dict())
    own = whole.state_dict()
    for name in own.keys() - state.keys():  # the classification layer; a distilled network has two, which it averages
        value = linear.get(name.rpartition(".")[2])
        if value is None or value.shape != own[name].shape:
            return None
        state[name] = value
    if state.keys() != own.keys():
        return None
    whole.load_state_dict(state)
    return whole.eval()


def _library_model(spec: ModelDescription) -> nn.Module:
    """The architecture with its own classification layer for the classes, random weights."""
    classes = len(spec.classes)
    if spec.backbone.startswith(TIMM):
        import timm

        short = spec.backbone.removeprefix(TIMM)
        options = timm_size_options(short, spec.image_size)
        network: nn.Module = timm.create_model(short, num_classes=classes, **options)
        return network
    model: nn.Module = torchvision.models.get_model(
        spec.backbone, weights=None, num_classes=classes, **_arguments(spec)
    )
    return model


def _arguments(spec: ModelDescription) -> dict[str, Any]:
    """Arguments of torchvision's builder."""
    arguments: dict[str, Any] = {}
    if spec.backbone in CONVERTS_IMAGES:
        arguments |= {"aux_logits": False, "transform_input": False, "init_weights": False}
    if spec.backbone.startswith("vit_"):
        arguments["image_size"] = spec.image_size
    return arguments


@torch.inference_mode()
def _is_equal(whole: nn.Module, model: TrainedModel, images: Tensor) -> bool:
    expected = model.network(images)
    output = whole(images)
    if output.shape != expected.shape:
        return False
    return bool((_probabilities(output, model.description) - expected).abs().max() <= equality.TOLERANCE)


def _probabilities(logits: Tensor, spec: ModelDescription) -> Tensor:
    return logits.softmax(dim=1) if spec.task == "classification" else logits.sigmoid()


def _write(state: dict[str, Tensor], path: Path) -> None:
    """Write copies: safetensors refuses tensors that share memory."""
    safetensors.torch.save_file({name: value.clone().contiguous() for name, value in state.items()}, path)


def _config(spec: ModelDescription, network: nn.Module, widths: list[int]) -> dict[str, Any]:
    """The content of ``config.json``: for timm in its own format."""
    classes = 0 if widths else len(spec.classes)
    own: dict[str, Any] = {"label_names": spec.classes, "task": spec.task, "thresholds": spec.thresholds}
    if widths:
        own["head"] = {"file": HEAD_FILE, "widths": widths}
    if spec.pooling != "auto":
        own["pooling"] = spec.pooling
    if not spec.backbone.startswith(TIMM):
        preprocessing = {"image_size": spec.image_size, "resize": spec.resize, "mean": spec.mean, "std": spec.std}
        named = {"library": "torchvision", "architecture": spec.backbone, "num_classes": classes}
        return {**named, "arguments": _arguments(spec), "preprocessing": preprocessing, **own}
    pretrained: dict[str, Any] = getattr(network, "pretrained_cfg", {})
    layers = {name: pretrained[name] for name in ("pool_size", "first_conv", "classifier") if pretrained.get(name)}
    if arguments := timm_size_options(spec.backbone.removeprefix(TIMM), spec.image_size):
        own["model_args"] = arguments
    return {
        "architecture": spec.backbone.removeprefix(TIMM).partition(".")[0],
        "num_classes": classes,
        "num_features": getattr(network, "num_features", None),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, spec.image_size, spec.image_size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash" if spec.resize == "squash" else "center",
            "mean": spec.mean,
            "std": spec.std,
            "num_classes": classes,
            **layers,
        },
        **own,
    }
