"""Backbones: classification architectures of torchvision and timm without their head, with pretrained weights."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from job.errors import ConfigError, JobError, WeightsError
from job.model.pooling import Pooling, set_pooling
from job.model.skeleton import WithoutMemory
from job.model.weights import PretrainedWeights, load_weights
from job.process.log_format import can_redraw

TIMM = "timm/"
CONVERTS_IMAGES = ("googlenet", "inception_v3")
"""Architectures of torchvision that, with pretrained weights, convert ImageNet's normalisation to the weights' own."""


def build_backbone(
    name: str,
    weights: str | PretrainedWeights = "none",
    image_size: int | None = None,
    pooling: Pooling = "auto",
) -> nn.Module:
    """Build the architecture ``name`` with its classification layer replaced by identity.

    All values of ``weights`` build the same network, so that a checkpoint fits it.

    Args:
        name: one of ``torchvision.models.list_models()``, or ``timm/NAME``.
        weights: ``DEFAULT`` (the library's own pretrained weights, downloaded), ``none`` (random), or tensors that
            :func:`~job.model.loading.read_weights` has read.
        image_size: height and width of images, for vision transformers, whose weights depend on it.
        pooling: of a vision transformer's tokens.

    Returns:
        A module from [B, 3, S, S] images to features.

    Raises:
        ConfigError: no such architecture, it does not have this pooling, or timm is not installed.
        WeightsError: the weights cannot be downloaded, or belong to another architecture.
    """
    pretrained = weights == "DEFAULT"
    backbone, head_prefixes = _build(name, pretrained, image_size)
    set_pooling(backbone, pooling, name)
    if isinstance(weights, PretrainedWeights):
        load_weights(
            backbone,
            weights.state,
            weights.uri,
            name,
            head_prefixes,
            lambda: _whole_state(name, image_size),
            (lambda state: _converted(state, backbone, name)) if name.startswith(TIMM) else None,
        )
    return backbone


def build_skeleton(name: str, image_size: int, pooling: Pooling = "auto") -> nn.Module:
    """Build the architecture on the meta device, to compare the names and shapes of its tensors.

    Raises:
        ConfigError: no such architecture, it does not have this pooling, or timm is not installed.
    """
    with WithoutMemory():
        backbone, _ = _build(name, pretrained=False, image_size=image_size)
        set_pooling(backbone, pooling, name)
    return backbone.to("meta")


def feature_width(backbone: nn.Module, image_size: int) -> int:
    """Measure the number of features per image by running the backbone once, on its device.

    Raises:
        ConfigError: it does not accept images of this size, or its output is not one vector per image.
    """
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            device = next((parameter.device for parameter in backbone.parameters()), None)
            features = backbone(torch.zeros(1, 3, image_size, image_size, device=device))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise _unsuitable_size(image_size, error) from error
    finally:
        backbone.train(training)
    if features.ndim != 2:
        raise ConfigError(f"the backbone outputs features of shape {tuple(features.shape)}, not one vector per image.")
    return int(features.shape[1])


def _unsuitable_size(image_size: int | None, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return ConfigError(
        f"the backbone does not accept {image_size}x{image_size} images: {reason}. Choose another --data.image_size."
    )


def _build(name: str, pretrained: bool, image_size: int | None) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the backbone, and the paths of its removed heads."""
    if name.startswith(TIMM):
        return _timm(name, pretrained, image_size, num_classes=0)
    model = _torchvision(name, pretrained, image_size)
    # Auxiliary heads are for training from scratch only, and make forward return a tuple.
    for auxiliary in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False  # type: ignore[assignment]
    layers = [
        path
        for path, layer in model.named_modules()
        if getattr(layer, "out_features", None) == 1000 or getattr(layer, "out_channels", None) == 1000
    ]
    model.set_submodule(layers[-1], nn.Identity())
    return model, (layers[-1], "AuxLogits", "aux1", "aux2")


def _whole_state(name: str, image_size: int | None) -> set[str]:
    """Names in the state dict of the architecture, heads included."""
    with WithoutMemory():
        timm_name = name.startswith(TIMM)
        model = _timm(name, False, image_size)[0] if timm_name else _torchvision(name, False, image_size)
    return set(model.state_dict())


def _converted(state: dict[str, Tensor], backbone: nn.Module, name: str) -> dict[str, Tensor]:
    """Convert the weights of an original repository, or of another image size, to a network of timm, as timm does."""
    import timm

    short = name.removeprefix(TIMM)
    modules = (timm.model_entrypoint(short).__module__, type(backbone).__module__)
    functions = (getattr(sys.modules.get(module), "checkpoint_filter_fn", None) for module in modules)
    convert = next((function for function in functions if function is not None), None)
    if convert is None:
        return state
    with contextlib.redirect_stdout(io.StringIO()):  # timm prints the names of biases that a network lacks
        result: dict[str, Tensor] = convert(dict(state), backbone)
    return result


def require_torchvision_name(name: str) -> None:
    """Check that torchvision has an architecture.

    Raises:
        ConfigError: it has none of this name.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else " Examples: resnet50, efficientnet_b0, vit_b_16."
        raise ConfigError(f"unknown backbone {name!r}.{hint} timm's are named timm/NAME.")


def timm_name(name: str) -> str:
    """timm's own name of the architecture timm/NAME.

    Raises:
        ConfigError: timm has none of this name, or is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"backbone {name!r} needs timm: pip install timm.") from error
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        close = difflib.get_close_matches(short, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(TIMM + c for c in close)}?" if close else ""
        raise ConfigError(f"unknown backbone {name!r}.{hint}")
    return short


def _torchvision(name: str, pretrained: bool, image_size: int | None) -> nn.Module:
    require_torchvision_name(name)
    options: dict[str, Any] = {}
    if name in CONVERTS_IMAGES:
        options["transform_input"] = False
        if not pretrained:  # the builder refuses the option together with weights
            options["init_weights"] = True
    if name.startswith("vit_") and image_size is not None and not pretrained:
        options["image_size"] = image_size
    try:
        with _download(name, pretrained):
            model: nn.Module = torchvision.models.get_model(
                name, weights="DEFAULT" if pretrained else None, progress=can_redraw(), **options
            )
    except AssertionError as error:
        raise _unsuitable_size(image_size, error) from error
    return model


def _timm(name: str, pretrained: bool, image_size: int | None, **options: Any) -> tuple[nn.Module, tuple[str, ...]]:
    short = timm_name(name)
    import timm

    options |= timm_size_options(short, image_size)
    try:
        with _download(name, pretrained):
            model: nn.Module = timm.create_model(short, pretrained=pretrained, **options)
    except (AssertionError, ValueError) as error:
        if "img_size" not in options:
            raise
        raise _unsuitable_size(image_size, error) from error
    head = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return model, (head,) if isinstance(head, str) else tuple(head)


def timm_size_options(short: str, image_size: int | None) -> dict[str, Any]:
    """The argument of ``timm.create_model`` for images of another size than the architecture's own, if it needs one.

    Args:
        short: timm's name of the architecture.
        image_size: height and width of images; None: the architecture's own.
    """
    return {"img_size": image_size} if image_size is not None and _needs_size(short, image_size) else {}


@functools.cache
def _needs_size(short: str, image_size: int) -> bool:
    import timm

    config = timm.get_pretrained_cfg(short)
    if config is None or not config.fixed_input_size or tuple(config.input_size[1:]) == (image_size, image_size):
        return False
    with WithoutMemory():
        model: nn.Module = timm.create_model(short, num_classes=0).to("meta")
        with contextlib.suppress(ConfigError):
            feature_width(model, image_size)
            return False  # it takes images of any size as it is
        try:
            timm.create_model(short, num_classes=0, img_size=image_size)
        except TypeError:
            return False  # it has no such argument
        except (AssertionError, ValueError):
            return True  # the builder names the problem
    return True


@contextlib.contextmanager
def _download(name: str, pretrained: bool) -> Iterator[None]:
    """Context for building with pretrained weights: errors become WeightsError, and pickled code is never run."""
    if not pretrained:
        yield
        return
    # torchvision loads weights with weights_only=False, from a folder that others may write to.
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    except JobError:
        raise
    except OSError as error:
        raise WeightsError(
            f"the pretrained weights of {name} cannot be downloaded: {error}. Give --model.weights the URI of a state "
            "dict in your bucket, or none."
        ) from error
    except Exception as error:  # damaged bytes raise errors of any class
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WeightsError(
            f"the pretrained weights of {name} cannot be loaded: {reason}. If their file in TORCH_HOME (by default "
            f"{torch.hub.get_dir()}) is damaged, remove it; or give --model.weights the URI of a state dict, or none."
        ) from error
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
