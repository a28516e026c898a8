"""Any classification architecture of torchvision or timm, without its head, and its weights."""

from __future__ import annotations

import difflib
import io
import pickle
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from job import storage
from job.errors import ConfigError, WeightsError

TIMM = "timm/"


def build_backbone(name: str, weights: str = "none") -> nn.Module:
    """The architecture ``name`` with its classification layer replaced by identity.

    Args:
        name: one of ``torchvision.models.list_models()``, or ``timm/NAME``.
        weights: ``DEFAULT`` (the library's own pretrained weights, downloaded), ``none`` (random), or
            the URI of a state dict (.pth, loaded with ``weights_only=True``, or .safetensors).

    Returns:
        A module from [B, 3, S, S] images to features.

    Raises:
        ConfigError: no such architecture, or timm is not installed.
        WeightsError: the weights cannot be had, or belong to another architecture.
    """
    pretrained = weights == "DEFAULT"
    build = _build_timm if name.startswith(TIMM) else _build_torchvision
    backbone, head_prefixes = build(name, pretrained)
    if weights not in ("DEFAULT", "none"):
        load_weights(backbone, read_state_dict(weights), weights, name, head_prefixes)
    return backbone


def feature_width(backbone: nn.Module, image_size: int) -> int:
    """The number of features the backbone gives for one image, found by running it once.

    Raises:
        ConfigError: it does not take images of this size, or does not end in a vector.
    """
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the backbone does not take {image_size}x{image_size} images: {str(error).splitlines()[0]}. "
            "Choose another --data.image_size."
        ) from error
    finally:
        backbone.train(training)
    if features.ndim != 2:
        raise ConfigError(f"the backbone gives features of shape {tuple(features.shape)}, not one vector an image.")
    return int(features.shape[1])


def _build_torchvision(name: str, pretrained: bool) -> tuple[nn.Module, tuple[str, ...]]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else " Examples: resnet50, efficientnet_b0, vit_b_16."
        raise ConfigError(f"unknown backbone {name!r}.{hint} timm's are named timm/NAME.")
    # Inception and GoogLeNet initialise slowly, by scipy, unless told not to; they say so themselves.
    options: dict[str, Any] = {"init_weights": True} if name in ("inception_v3", "googlenet") else {}
    try:
        model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    except OSError as error:
        raise _download_failed(name, error) from error
    # Auxiliary heads only serve training from scratch, and make forward return a tuple.
    for auxiliary in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    layers = [
        (path, layer)
        for path, layer in model.named_modules()
        if getattr(layer, "out_features", None) == 1000 or getattr(layer, "out_channels", None) == 1000
    ]
    path, _ = layers[-1]
    model.set_submodule(path, nn.Identity())
    return model, (path, "AuxLogits", "aux1", "aux2")


def _build_timm(name: str, pretrained: bool) -> tuple[nn.Module, tuple[str, ...]]:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"backbone {name!r} needs timm: pip install timm.") from error
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        close = difflib.get_close_matches(short, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(TIMM + c for c in close)}?" if close else ""
        raise ConfigError(f"unknown backbone {name!r}.{hint}")
    try:
        model: nn.Module = timm.create_model(short, pretrained=pretrained, num_classes=0)
    except OSError as error:
        raise _download_failed(name, error) from error
    head = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return model, (head,) if isinstance(head, str) else tuple(head)


def _download_failed(name: str, error: OSError) -> WeightsError:
    return WeightsError(
        f"the pretrained weights of {name} cannot be downloaded: {error}. Give --model.weights the URI of a "
        "state dict in your bucket, or none."
    )


def read_state_dict(uri: str) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors or .pth file; pickled code is never run.

    Raises:
        WeightsError: the file holds no state dict of tensors.
        StorageError: it cannot be read.
    """
    content = storage.read_bytes(uri)
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"{uri} is no state dict that can be loaded safely: {str(error).splitlines()[0]}. Save "
            "model.state_dict() with torch.save, or as .safetensors."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{uri} holds no state dict: a mapping of names to tensors is expected.")
    return dict(loaded)


def load_weights(
    backbone: nn.Module, state: dict[str, Tensor], source: str, name: str, head_prefixes: tuple[str, ...]
) -> None:
    """Load ``state`` into the backbone, strictly; only its classification layer may be left over.

    Raises:
        WeightsError: names or shapes differ; the message lists the first of them.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{p}." for p in head_prefixes))}
    expected = backbone.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    found = [("missing", missing), ("not of this architecture", unexpected), ("of another shape", wrong)]
    told = [f"{len(n)} {what}: {', '.join(n[:4])}{', …' if len(n) > 4 else ''}" for what, n in found if n]
    if told:
        raise WeightsError(f"the weights {source} do not fit the backbone {name}; {'; '.join(told)}.")
    backbone.load_state_dict(state)
